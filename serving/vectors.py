"""Keeps with saved vectors what made them, as `model.fingerprint` says it, and compares it where they are read.

A Parquet file has it in its schema's metadata, `NAME.npy` in a file `NAME.npy.json` beside it.
"""

import json
from collections.abc import Collection
from pathlib import Path

from saving_utils import write_json


KEY = b"causal2vec.fingerprint"  # of a Parquet schema's metadata
_HASHED = ("weights", "config", "tokenizers", "code", "examples")


def with_fingerprint(schema, fingerprint: dict):
    """A `pyarrow.Schema` with the fingerprint in its metadata."""
    return schema.with_metadata({**(schema.metadata or {}), KEY: json.dumps(fingerprint).encode()})


def fingerprint_file(path: str | Path) -> Path:
    """Where the fingerprint of a .npy file stands. Remove it before the vectors are replaced, and write it after that."""
    return Path(f"{path}.json")


def write_fingerprint(path: str | Path, fingerprint: dict) -> None:
    """Writes the fingerprint of a .npy file."""
    write_json(fingerprint_file(path), fingerprint)


def read_fingerprint(path: str | Path) -> dict | None:
    """
    The fingerprint that a .parquet or .npy file has; `None` where it has none.

    Raises:
        ValueError: it is damaged.
    """
    if Path(path).suffix == ".parquet":
        import pyarrow.parquet as pq

        text = (pq.read_schema(path).metadata or {}).get(KEY)
    else:
        file = fingerprint_file(path)
        text = file.read_bytes() if file.is_file() else None
    try:
        found = None if text is None else json.loads(text)
    except ValueError as error:
        raise ValueError(f"The fingerprint of {path} is damaged: {error}. Embed the texts again.") from error
    if found is not None and not isinstance(found, dict):
        raise ValueError(f"The fingerprint of {path} must be a JSON object, got {found!r:.80}. Embed the texts again.")
    return found


def check_fingerprint(
    found: dict | None, expected: dict, what: str = "the vectors", ignore: Collection[str] = ()
) -> None:
    """
    Args:
        found (`dict`, *optional*): What stands with saved vectors.
        expected (`dict`): `model.fingerprint(...)` of those to compare them with.
        what (`str`): What the error calls the saved ones.
        ignore: Fields that may differ.

    Raises:
        ValueError: they may not be compared. Says what differs, and what to do.
    """
    if found is None:
        raise ValueError(f"Nothing says what made {what}: there is no fingerprint. Embed the texts again.")
    names = [name for name in {**expected, **found} if name not in ignore and found.get(name) != expected.get(name)]
    if not names:
        return
    told = [
        name if name in _HASHED else f"{name} ({found.get(name)!r} there, {expected.get(name)!r} here)"
        for name in names
    ]
    which = "the same model" if set(names) & set(_HASHED[:-1]) else "the same arguments"
    raise ValueError(
        f"What made {what} differs from what is compared with them in {', '.join(told)}. Use {which}, or embed the texts "
        "again."
    )
