"""Local data folders: a revision computed from their content, and a cache keyed by it."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def folder_revision(folder: Path) -> str:
    """A hash of a local dataset's content, the counterpart of a commit on the Hub."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        relative = file.relative_to(folder)
        if file.is_file() and not any(part.startswith(".") for part in relative.parts):
            digest.update(f"{relative.as_posix()}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return f"local-{digest.hexdigest()[:16]}"


@contextmanager
def own_cache(revision: str) -> Iterator[None]:
    """
    Keys the cache of `datasets` by content. By default it is keyed by the folder's name, and would return the data of
    another folder of that name, or of the same folder before a change.
    """
    import datasets

    common = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = Path(common) / revision
    try:
        yield
    finally:
        datasets.config.HF_DATASETS_CACHE = common
