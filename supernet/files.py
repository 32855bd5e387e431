"""Files and folders that are there whole or not at all, whenever the writer is killed.

Data go to a temporary name in the same folder, reach the disk (fsync), and take their name with a
rename, which POSIX makes atomic. The temporary name is fixed, so the next attempt overwrites what
a killed one left; a path has one writer at a time.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: Path | str, data: bytes | str) -> None:
    """Write `data` (text as UTF-8) to the file `path`, replacing what is there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path, "tmp")
    with _named(temporary, path):
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


@contextmanager
def directory_atomically(path: Path | str) -> Iterator[Path]:
    """Fill the directory that this yields; it becomes `path` when the block ends without an error.

    A directory that is already there is replaced. No rename replaces a full directory, so it steps
    aside first; a kill between the two renames is mended by `recover_directory`.
    """
    path = Path(path)
    recover_directory(path)
    temporary, previous = _beside(path, "tmp"), _beside(path, "old")
    if temporary.exists():
        shutil.rmtree(temporary)
    with _named(temporary, path):
        temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary)
        raise
    for folder, _, files in os.walk(temporary):
        for name in files:
            sync(Path(folder, name))
        sync(Path(folder))
    if path.exists():
        os.rename(path, previous)
    os.rename(temporary, path)
    sync(path.parent)
    if previous.exists():
        shutil.rmtree(previous)


def recover_directory(path: Path | str) -> None:
    """Bring back a directory whose replacement was killed. Call before reading `path`."""
    path = Path(path)
    previous = _beside(path, "old")
    if not previous.exists():
        return
    if path.exists():
        shutil.rmtree(previous)
    else:
        os.rename(previous, path)
        sync(path.parent)


@contextmanager
def exclusive(folder: Path | str) -> Iterator[None]:
    """Keep other processes out of a folder; BlockingIOError where one is inside.

    The lock dies with its process, however that ends.
    """
    import fcntl  # POSIX alone has it; only who locks needs it

    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder, ".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def sync(path: Path) -> None:
    """Wait until a file's data, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _named(temporary: Path, path: Path) -> Iterator[None]:
    """Let an OSError of a temporary name speak of the one that was asked for."""
    try:
        yield
    except OSError as error:
        if error.filename == str(temporary):
            error.filename = str(path)
        raise


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{suffix}")
