"""The package of two checkouts side by side: where the base comes from, and a process on each."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from tossup.autotune.offline import FUSION

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path("tossup/__init__.py")

Answer = dict[str, Any]
Ask = Callable[[Answer], Answer]


def end_on_sigterm() -> None:
    """Let SIGTERM end this process as an exception does, so that it leaves no worktree behind."""

    def end(*_: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would stop the first's work
        sys.exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)


@contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """A checkout of a revision, gone afterwards; or the folder that it names."""
    takes = "gate: --base takes a revision of git, or a folder that holds the package tossup"
    if Path(revision).is_dir():
        if not Path(revision, PACKAGE).exists():
            raise SystemExit(f"{takes}, got {revision!r}")
        yield Path(revision).resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "base")
        git = ["git", "-C", str(ROOT), "worktree"]
        try:
            if subprocess.run([*git, "add", "--quiet", "--detach", path, revision]).returncode:
                raise SystemExit(f"{takes}, got {revision!r}")
            yield path
        finally:
            if path.exists():  # forced twice, as git locks one that it has not finished
                subprocess.run([*git, "remove", "--force", "--force", path])


def own_path() -> Iterator[str]:
    """Where `python -m` finds modules beside those installed, for a process in another folder."""
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    yield from (os.path.abspath(folder) for folder in (*filter(None, named), os.curdir))


@contextmanager
def worker(checkout: Path, device: str, modules: Sequence[str] = ()) -> Iterator[Ask]:
    """A process of bench/worker.py, of this revision, on the package of a checkout.

    modules: what it imports for workloads of a user's, from the checkout, or from where this
    process finds them."""
    path = os.pathsep.join([str(checkout), *own_path()])
    process = subprocess.Popen(
        [sys.executable, "-P", ROOT / "bench/worker.py", device, *modules],
        env={FUSION: "1"} | os.environ | {"PYTHONPATH": path},  # said, lest Triton warns
        cwd=checkout, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None

    def answer() -> Answer:
        line = process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise SystemExit(f"gate: the worker at {checkout} ended; its last lines are above")
        return json.loads(line)

    def ask(request: Answer) -> Answer:
        with suppress(BrokenPipeError):  # it has ended, which `answer` tells
            print(json.dumps(request), file=process.stdin, flush=True)
        return answer()

    try:
        began = answer()
        package = Path(began["package"]).resolve()
        if package != checkout.resolve() / PACKAGE:
            raise SystemExit(f"gate: the worker imported {package}, not the package of {checkout}")
        if "error" in began:
            raise SystemExit(f"gate: --workloads at {checkout}: {began['error']}")
        yield ask
    except BaseException:
        process.kill()  # nobody waits for what it was asked
        raise
    finally:
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.wait()
