"""Byte-level text from local files: a token is a byte, and a sequence a window of one file."""

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
from .dataset import Dataset, Stream

STDLIB = "python-stdlib"


class TextConfig(Strict):
    """Text files as bytes.

    paths: files, globs (`**` for any depth) and directories (searched at any depth for `suffixes`).
        `python-stdlib` is the source of the running interpreter's own library, without its tests.
    max_bytes: how much to load. Files come in the order of the hashes of their relative paths, so
        that a cap takes a fair sample of them; the last one is cut.
    held_out: the fraction of files that only evaluation sees, at least one: the first in order.
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
    max_bytes: int = Field(default=2**26, ge=1, description="to load")

    @property
    def vocab_size(self) -> int:
        """One token per value of a byte."""
        return 256


class Text(Dataset):
    """Windows of `length` bytes and, as labels, the bytes that follow each; see TextConfig.

    Every window of every file is equally likely. A file of `length` bytes or fewer has none.
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
            "evaluation": _Windows("evaluation", files[:held_out], self.length),
            "training": _Windows("training", files[held_out:], self.length),
        }

    def _sequences(
        self, random: np.random.Generator, batch_size: int, stream: Stream
    ) -> tuple[np.ndarray, np.ndarray]:
        windows = self._parts[stream].draw(random, batch_size).astype(np.int64)
        return windows[:, :-1].copy(), windows[:, 1:].copy()

    def _identity(self) -> dict[str, Any]:
        parts = {stream: windows.digest() for stream, windows in self._parts.items()}
        return {"type": "text", "length": self.length, **parts}


class _Windows:
    """All windows of length + 1 bytes in some files, numbered one after another."""

    def __init__(self, name: str, files: list[bytes], length: int) -> None:
        sizes = np.array([len(content) for content in files], dtype=np.int64)
        counts = np.maximum(sizes - length, 0)
        if not counts.sum():
            raise ConfigError(
                f"data.paths: no {name} file is longer than length = {length} bytes "
                f"({len(files)} {name} files); give more or longer files in paths"
            )
        self._bytes = np.frombuffer(b"".join(files), dtype=np.uint8)
        self._starts = np.cumsum(sizes) - sizes
        self._ends = np.cumsum(counts)  # number of windows up to and including each file
        self._counts = counts
        self._span = np.arange(length + 1)

    def draw(self, random: np.random.Generator, batch_size: int) -> np.ndarray:
        """uint8, (batch_size, length + 1)."""
        window = random.integers(self._ends[-1], size=batch_size)
        file = np.searchsorted(self._ends, window, side="right")
        start = self._starts[file] + window - (self._ends[file] - self._counts[file])
        return self._bytes[start[:, None] + self._span]

    def digest(self) -> str:
        """A hash of the bytes and of where files begin."""
        return hashlib.sha256(self._starts.tobytes() + self._bytes.tobytes()).hexdigest()


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
