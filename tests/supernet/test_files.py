"""Files and folders that are there whole or not at all."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tossup.supernet.files import (
    directory_atomically,
    exclusive,
    recover_directory,
    write_atomically,
)

ROOT = Path(__file__).parents[2]


def test_a_file_is_written_and_replaced_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "new" / "result.json"
    write_atomically(path, "first, and longer")
    write_atomically(path, b"second")
    assert path.read_bytes() == b"second"
    assert os.listdir(path.parent) == ["result.json"]


def test_a_directory_is_replaced_whole(tmp_path):
    path = tmp_path / "checkpoint"
    for names in (["a", "b"], ["c"]):
        with directory_atomically(path) as folder:
            assert folder != path
            for name in names:
                (folder / name).write_text(name)
    assert os.listdir(path) == ["c"]
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_an_error_leaves_the_directory_as_it_was(tmp_path):
    path = tmp_path / "checkpoint"
    with directory_atomically(path) as folder:
        (folder / "a").write_text("good")
    with pytest.raises(KeyError), directory_atomically(path) as folder:
        (folder / "a").write_text("bad")
        raise KeyError
    assert (path / "a").read_text() == "good"
    assert os.listdir(tmp_path) == ["checkpoint"]


REPLACE_AND_DIE = """
import os, signal, sys
from pathlib import Path
from tossup.supernet import files

renames = 0
rename = os.rename

def dying(source, target):
    global renames
    if renames == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    renames += 1
    rename(source, target)

os.rename = dying
with files.directory_atomically(Path(sys.argv[1])) as folder:
    (folder / "a").write_text("new")
"""


@pytest.mark.parametrize("renames_done", [0, 1])
def test_a_kill_during_the_replacement_keeps_the_previous_directory(tmp_path, renames_done):
    path = tmp_path / "checkpoint"
    with directory_atomically(path) as folder:
        (folder / "a").write_text("old")
    command = [sys.executable, "-c", REPLACE_AND_DIE, str(path), str(renames_done)]
    assert subprocess.run(command, cwd=ROOT).returncode == -signal.SIGKILL
    recover_directory(path)
    assert (path / "a").read_text() == "old"
    with directory_atomically(path) as folder:
        assert not os.listdir(folder)
    assert os.listdir(tmp_path) == ["checkpoint"]


HOLD = """
import sys
from tossup.supernet.files import exclusive
with exclusive(sys.argv[1]):
    print("inside", flush=True)
    sys.stdin.read()
"""


def test_a_folder_admits_one_process_and_is_free_again_when_that_ends(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "new")]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"inside\n"
        with pytest.raises(BlockingIOError), exclusive(tmp_path / "new"):
            pass
        other.kill()
    with exclusive(tmp_path / "new"):
        pass
    with exclusive(tmp_path / "new"):
        pass


def test_what_locks_nothing_runs_where_there_are_no_posix_locks(tmp_path):
    script = "import sys; sys.modules['fcntl'] = None; import tossup.supernet.files"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0
