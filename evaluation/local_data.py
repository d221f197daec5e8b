"""Folders of data on this machine: what stands for their content, and a cache that goes by it."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def folder_revision(folder: Path) -> str:
    """Stands for the content of a local dataset, as a commit does for one on the Hub."""
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
    Gives each content of a local folder a cache of its own: that of `datasets` goes by the folder's name, and would give
    out what another folder of this name held, or the same one before it was changed.
    """
    import datasets

    common = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = Path(common) / revision
    try:
        yield
    finally:
        datasets.config.HF_DATASETS_CACHE = common
