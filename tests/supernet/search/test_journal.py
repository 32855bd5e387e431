"""The journal: a search goes on from it to the same bytes, whatever stopped it."""

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.supernet.search.tables import (
    FINGERPRINTS,
    Table,
    config_of,
    random_quality,
    space_of,
)
from tossup.supernet.errors import ConfigError
from tossup.supernet.search import (
    search,
)
from tossup.supernet.search.journal import Fingerprints, Journal
from tossup.supernet.search.result import write_result

ROOT = Path(__file__).parents[3]


def beam_with_journal(tmp_path, table, fingerprints=FINGERPRINTS, chunk=4):
    """Search, write the result, and return its bytes and the journal's counts."""
    config = config_of(tmp_path, [3, 1])
    with Journal(config.journal(tmp_path), table, fingerprints, chunk) as journal:
        outcome = search(config, space_of(6, [3, 1]), journal)
    write_result(config.output_path, config, outcome, fingerprints)
    return config.output_path.read_bytes(), journal.reused, journal.evaluated


def test_a_second_search_evaluates_nothing_and_agrees(tmp_path):
    table = Table(random_quality(0))
    first, reused, evaluated = beam_with_journal(tmp_path, table)
    assert (reused, evaluated) == (0, len(table.seen))
    assert max(map(len, table.calls)) == 4
    again = Table(random_quality(0))
    assert beam_with_journal(tmp_path, again) == (first, evaluated, 0)
    assert not again.calls


def test_scores_from_the_journal_are_the_same_numbers(tmp_path):
    values = [0.1 + 0.2, 1e-300, -1 / 3, 123456789.123456789]
    placements = [(str(index),) for index in range(len(values))]
    table = Table(lambda placement: values[int(placement[0])])
    for _ in range(2):
        with Journal(tmp_path / "j", table, FINGERPRINTS, 3) as journal:
            scores = journal([*placements, placements[0]])
        assert [score.metrics["accuracy"] for score in scores] == [*values, values[0]]
        assert scores[0].standard_errors == {"accuracy": 0.25}
    assert [len(call) for call in table.calls] == [3, 1]


@pytest.mark.parametrize(
    "other",
    [
        Fingerprints("other", "d", {"batches": 2}),
        Fingerprints("m", "other", {"batches": 2}),
        Fingerprints("m", "d", {"batches": 3}),
    ],
)
def test_another_model_data_or_setting_reuses_nothing(tmp_path, other):
    beam_with_journal(tmp_path, Table(random_quality(0)))
    changed = Table(random_quality(1))
    _, reused, evaluated = beam_with_journal(tmp_path, changed, other)
    assert (reused, evaluated) == (0, len(changed.seen))
    _, reused, evaluated = beam_with_journal(tmp_path, Table(random_quality(0)))
    assert reused > 0 and evaluated == 0  # the first one's scores are still there


@pytest.mark.parametrize("seed", range(8))
def test_a_journal_cut_anywhere_resumes_to_the_same_bytes_in_the_same_chunks(tmp_path, seed):
    whole = Table(random_quality(0))
    result, _, _ = beam_with_journal(tmp_path, whole)
    path = config_of(tmp_path, [3, 1]).journal(tmp_path)
    journal = path.read_bytes()
    path.write_bytes(journal[: random.Random(seed).randrange(len(journal))])
    resumed = Table(random_quality(0))
    assert beam_with_journal(tmp_path, resumed)[0] == result
    assert path.read_bytes() == journal
    assert resumed.calls == whole.calls[len(whole.calls) - len(resumed.calls) :]


SEARCH_AND_DIE = """
import os, signal, sys
from pathlib import Path
from tests.supernet.search.tables import Table, random_quality
from tests.supernet.search.test_journal import beam_with_journal

folder, die_at, keep = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
calls, size, fsync = 0, 0, os.fsync

def dying(descriptor):
    '''Die at one of the writes to the journal, of which a part has reached the file.'''
    global calls, size
    if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".jsonl"):
        calls += 1
        grown = os.fstat(descriptor).st_size
        if calls == die_at:
            os.ftruncate(descriptor, size + int(keep * (grown - size)))
            os.kill(os.getpid(), signal.SIGKILL)
        size = grown
    fsync(descriptor)

os.fsync = dying
beam_with_journal(folder, Table(random_quality(0)))
"""


@pytest.mark.parametrize(
    ("die_at", "keep"), [(1, 0.0), (1, 0.9), (3, 0.3), (5, 0.5), (7, 0.99), (9, 1.0)]
)
def test_a_search_killed_while_it_writes_resumes_to_the_same_bytes(tmp_path, die_at, keep):
    whole = Table(random_quality(0))
    expected, _, _ = beam_with_journal(tmp_path / "whole", whole)
    killed = tmp_path / "killed"
    command = [sys.executable, "-c", SEARCH_AND_DIE, str(killed), str(die_at), str(keep)]
    assert subprocess.run(command, cwd=ROOT).returncode == -signal.SIGKILL
    assert not (killed / "search.json").exists()
    resumed = Table(random_quality(0))
    result, reused, _ = beam_with_journal(killed, resumed)
    assert result == expected
    done = die_at - (keep < 1)
    assert resumed.calls == whole.calls[done:]
    assert reused == sum(map(len, whole.calls[:done]))
    journals = [folder / "search.journal.jsonl" for folder in (killed, tmp_path / "whole")]
    assert journals[0].read_bytes() == journals[1].read_bytes()


@pytest.mark.parametrize(
    "damage", [b"{}\n", b"not json\n", b'{"key": 1}\n', b"\n", b"\xff\xfe\n", b"[]\n"]
)
@pytest.mark.parametrize("line", [0, 5])
def test_a_corrupt_line_is_one_clear_error(tmp_path, damage, line):
    beam_with_journal(tmp_path, Table(random_quality(0)))
    path = config_of(tmp_path, [3, 1]).journal(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[line] = damage
    path.write_bytes(b"".join(lines))
    with pytest.raises(ConfigError, match=rf"line {line + 1}: not a record"):
        beam_with_journal(tmp_path, Table(random_quality(0)))
    assert path.read_bytes() == b"".join(lines)  # nothing was thrown away


def test_missing_lines_are_an_error(tmp_path):
    beam_with_journal(tmp_path, Table(random_quality(0)))
    path = config_of(tmp_path, [3, 1]).journal(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:1] + lines[2:]))
    with pytest.raises(ConfigError, match="line 2: lines are missing"):
        beam_with_journal(tmp_path, Table(random_quality(0)))


def test_a_journal_has_one_user_at_a_time(tmp_path):
    table = Table(random_quality(0))
    with Journal(tmp_path / "j", table, FINGERPRINTS, 1):
        with pytest.raises(ConfigError, match="in use by another search"):
            Journal(tmp_path / "j", table, FINGERPRINTS, 1)
    Journal(tmp_path / "j", table, FINGERPRINTS, 1).__exit__(None, None, None)
