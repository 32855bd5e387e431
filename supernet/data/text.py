"""Byte-level text from local files: a token is a byte, and a sample a window of one file, or of
files one after the other."""

import glob
import hashlib
import itertools
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from ...autotune.schema import Strict
from ..errors import ConfigError
from .dataset import IGNORED, Dataset, Stream

STDLIB = "python-stdlib"


class TextConfig(Strict):
    """Text files as bytes.

    paths: files, globs (`**` for any depth) and directories (searched at any depth for `suffixes`).
        `python-stdlib` is the source of the running interpreter's own library, without its tests.
    max_bytes: how much to load. Files come in the order of the hashes of their relative paths, so
        that a cap takes a fair sample of them; the last one is cut.
    held_out: the fraction of files that only evaluation sees, at least one: the first in order.
    packed: a sample is a window of all files, one after the other in that order. Those that it
        holds are sequences of their own, of which none sees or predicts another.
    """

    type: Literal["text"] = "text"
    paths: tuple[str, ...] = Field(
        min_length=1,
        description="files, globs and folders; python-stdlib is the interpreter's own library",
    )
    suffixes: tuple[str, ...] = Field((".txt",), description="of the files that count in folders")
    length: int = Field(default=256, ge=1, description="bytes of a sample")
    held_out: float = Field(
        default=0.1, gt=0, lt=1, description="the fraction of files that evaluation has for itself"
    )
    packed: bool = Field(
        False, description="files one after the other, several in a sample: none sees another"
    )
    max_bytes: int = Field(default=2**26, ge=1, description="to load")

    @property
    def vocab_size(self) -> int:
        """One token per value of a byte."""
        return 256


class Text(Dataset):
    """Windows of `length` bytes and, as labels, the bytes that follow each; see TextConfig.

    Every window of every file is equally likely, and a file of `length` bytes or fewer has none;
    or, packed, every window of all files together.
    Raises ConfigError where a path has no files, or either part of the split has no window.
    """

    vocab_size = 256

    def __init__(self, config: TextConfig, seed: int) -> None:
        super().__init__(seed)
        self.config = config
        self.length = config.length
        files = _load(config)
        held_out = max(1, round(config.held_out * len(files)))
        self._parts = {
            "evaluation": _Windows("evaluation", files[:held_out], config),
            "training": _Windows("training", files[held_out:], config),
        }

    def _sequences(
        self, random: np.random.Generator, batch_size: int, stream: Stream
    ) -> tuple[np.ndarray, ...]:
        windows = self._parts[stream]
        places = windows.draw(random, batch_size)
        content = windows.bytes_at(places)
        tokens, labels = content[:, :-1].copy(), content[:, 1:].copy()
        if not self.config.packed:
            return tokens, labels
        files = windows.files_at(places)
        labels[files[:, :-1] != files[:, 1:]] = IGNORED
        return tokens, labels, files[:, :-1] - files[:, :1]

    def _identity(self) -> dict[str, Any]:
        parts = {stream: windows.digest() for stream, windows in self._parts.items()}
        packed = {"packed": True} if self.config.packed else {}
        return {"type": "text", "length": self.length, **packed, **parts}


class _Windows:
    """All windows of length + 1 bytes in each of some files, or of all together, numbered one after
    another."""

    def __init__(self, name: str, files: list[bytes], config: TextConfig) -> None:
        sizes = np.array([len(content) for content in files], dtype=np.int64)
        stretches = sizes.sum(keepdims=True) if config.packed else sizes
        counts = np.maximum(stretches - config.length, 0)
        if not counts.sum():
            are = "all {} files together are no" if config.packed else "no {} file is"
            raise ConfigError(
                f"data.paths: {are.format(name)} longer than length = {config.length} bytes "
                f"({len(files)} {name} files); give more or longer files in paths"
            )
        self._bytes = np.frombuffer(b"".join(files), dtype=np.uint8)
        self._starts = np.cumsum(sizes) - sizes
        self._offsets = np.cumsum(stretches) - stretches
        self._ends = np.cumsum(counts)  # number of windows up to and including each stretch
        self._counts = counts
        self._span = np.arange(config.length + 1)

    def draw(self, random: np.random.Generator, batch_size: int) -> np.ndarray:
        """Places of bytes, int64, (batch_size, length + 1)."""
        window = random.integers(self._ends[-1], size=batch_size)
        stretch = np.searchsorted(self._ends, window, side="right")
        start = self._offsets[stretch] + window - (self._ends[stretch] - self._counts[stretch])
        return start[:, None] + self._span

    def bytes_at(self, places: np.ndarray) -> np.ndarray:
        return self._bytes[places].astype(np.int64)

    def files_at(self, places: np.ndarray) -> np.ndarray:
        """The numbers of the files that hold these bytes."""
        return np.searchsorted(self._starts, places, side="right") - 1

    def digest(self) -> str:
        """A hash of the bytes and of where files begin."""
        whole = hashlib.sha256(self._starts.tobytes())
        whole.update(self._bytes.data)
        return whole.hexdigest()


def _load(config: TextConfig) -> list[bytes]:
    """The files' contents in the order of their names' hashes, up to max_bytes."""
    names: dict[Path, str] = {}
    for path in config.paths:
        found = dict(_find(path, config.suffixes))
        if not found:
            raise ConfigError(
                f"data.paths: {path!r} has no files; it takes a file, a glob, {STDLIB!r}, or a "
                f"directory with files that end in one of {list(config.suffixes)}"
            )
        names = found | names  # a file found twice keeps its first name
    order = sorted(names, key=lambda file: (hashlib.sha256(names[file].encode()).digest(), file))
    files, left = [], config.max_bytes
    for file in order:
        with file.open("rb") as stream:
            files.append(stream.read(left))
        left -= len(files[-1])
        if not left:
            break
    return files


def _find(path: str, suffixes: tuple[str, ...]) -> Iterator[tuple[Path, str]]:
    """Files, each with its path relative to the directory, or to what precedes the wildcards."""
    if path == STDLIB:
        yield from _standard_library()
        return
    root = Path(path).expanduser()
    if root.is_dir():
        for file in root.rglob("*"):
            if file.is_file() and file.name.endswith(suffixes):
                yield file.resolve(), file.relative_to(root).as_posix()
        return
    if root.is_file():
        yield root.resolve(), root.name
        return
    fixed = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), root.parts))
    for file in map(Path, glob.glob(str(root), recursive=True)):
        if file.is_file():
            yield file.resolve(), file.relative_to(fixed).as_posix()


def _standard_library() -> Iterator[tuple[Path, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in left_out]  # not walked, for speed
        for file in (Path(folder, name) for name in names if name.endswith(".py")):
            yield file.resolve(), file.relative_to(root).as_posix()
