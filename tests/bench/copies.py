"""Copies of this repository's folders, to be bases of a gate."""

import shutil
from pathlib import Path

from bench.checkouts import ROOT

PACKAGE = ("tossup", "kernels", "autotune", "supernet")


def copy_folders(to: Path, names: tuple[str, ...] = PACKAGE) -> None:
    """By default the package's, with the links that lead to them."""
    for name in names:
        skip = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / name, to / name, symlinks=True, ignore=skip)
