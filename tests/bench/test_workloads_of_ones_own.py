"""Workloads of a user's reach races, records and the gate's workers, as bench/README.md shows."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bench import gate
from tests.bench.copies import PACKAGE, copy_folders
from tossup.autotune.workloads import ON_CPU, ON_GPU, OPS, import_workloads
from tossup.supernet.cli import main

README = (gate.ROOT / "bench/README.md").read_text("utf-8")
MODULE, WORKFLOW = (
    re.search(f"```{kind}\n(.*?)```", README, re.DOTALL)[1] for kind in ("python", "yaml")
)
CASE = "mlp batch=1 seqlen=16 dim=8 hidden=24 dtype=fp32"
CLOCKLESS = """
from bench import host, record, startup
host.measure = startup.measure = dict
raise SystemExit(record.main())
"""


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    """A folder with the README's module, on the path; what it registers is forgotten afterwards."""
    (tmp_path / "my_workloads.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{gate.ROOT}")
    monkeypatch.syspath_prepend(tmp_path)
    ops, on_cpu, on_gpu = dict(OPS), list(ON_CPU), list(ON_GPU)
    yield tmp_path
    OPS.clear()
    OPS.update(ops)
    ON_CPU[:], ON_GPU[:] = on_cpu, on_gpu
    sys.modules.pop("my_workloads", None)


def test_bench_races_it(own, capsys):
    assert main(["bench", "--workloads", "my_workloads", *CASE.split(), "active=1"]) == 0
    printed = capsys.readouterr().out
    for direction in ("forward", "backward", "forward+backward"):
        assert f"{CASE} active=1, {direction}\n" in printed
    assert len(re.findall(r"torch +\S+ ms .* × our time, \S+ TFLOP/s", printed)) == 3
    assert main(["bench", "mlp", "dim=0", "--workloads", "my_workloads"]) == 2
    assert "dim takes a whole number from 1 on, got 0" in capsys.readouterr().err
    assert main(["bench", "mlp", "--workloads", "no_such_module"]) == 2
    sentence = "--workloads takes a module that can be imported, got 'no_such_module': No module"
    assert sentence in capsys.readouterr().err


def test_a_record_holds_its_shapes(own):
    shape = "batch=1, seqlen=16, dim=8, hidden=24, dtype='fp32'"
    extra = f"\nfrom tossup.autotune.workloads import ON_CPU\nON_CPU.append(Mlp({shape}))\n"
    (own / "my_workloads.py").write_text(MODULE + extra)
    words = ["--workloads", "my_workloads", "--op", "mlp", "--seconds", "0.01"]
    command = [sys.executable, "-c", CLOCKLESS, *words, "--output", own / "results"]
    subprocess.run(command, check=True, cwd=gate.ROOT)
    (path,) = (own / "results").rglob("*.json")
    races = json.loads(path.read_text())["races"]
    assert [race["workload"] for race in races] == [CASE] * 3
    assert all(race["entrants"].keys() == {"ours", "torch"} for race in races)


def test_a_gate_compares_it_on_both_sides(own):
    import_workloads(["my_workloads"])
    asked = []

    def seen(ask):
        return lambda request: asked.append(request) or ask(request)

    with (
        gate.worker(gate.ROOT, "cpu", ["my_workloads"]) as base,
        gate.worker(gate.ROOT, "cpu", ["my_workloads"]) as head,
    ):
        tally = gate.check_revisions(seen(base), seen(head), gate.cases_of(CASE.split()), 1.1, 1)
    assert (tally.compared, tally.cases, tally.failed) == (3, 3, [])
    assert {request["op"] for request in asked} == {"mlp"}


def test_a_folder_as_base_has_its_own_module(own, tmp_path_factory):
    """Found there first, so that two revisions of it can be compared."""
    base = tmp_path_factory.mktemp("base")
    copy_folders(base)
    for old, sentence in (
        ("from no_such_module import kernel", "my_workloads cannot be imported: No module named"),
        ("raise RuntimeError('too old')", "my_workloads cannot be imported: too old"),
    ):
        (base / "my_workloads.py").write_text(old)
        with pytest.raises(SystemExit, match=f"--workloads at {base}: {sentence}"):
            with gate.worker(base, "cpu", ["my_workloads"]):
                pass
    (base / "my_workloads.py").write_text(MODULE.replace("hidden", "inner"))
    request = {"op": "mlp", "values": {"hidden": 8}, "direction": "forward", "rounds": 1}
    with gate.worker(base, "cpu", ["my_workloads"]) as ask:
        answer = ask(request)
    assert answer["unknown"] and "mlp takes the keys batch, seqlen, dim, inner" in answer["error"]


@pytest.mark.skipif(shutil.which("git") is None, reason="a workflow begins with git")
def test_the_workflow_of_the_readme_runs_on_a_cpu(own):
    """With git and the gate as they are, and nothing to install; times are as they come."""
    copy_folders(own / "of-tossup", (*PACKAGE, "bench"))
    old, new = repository(own / "of-tossup")
    (own / "mine").mkdir()
    (own / "mine/my_workloads.py").write_text(MODULE)
    (own / "mine/tossup-revision").write_text(f"{old}\n")
    repository(own / "mine")
    git("clone", "--quiet", "mine", "checkout", at=own)
    (own / "checkout/tossup-revision").write_text(f"{new}\n")

    workflow = yaml.safe_load(WORKFLOW)
    assert workflow["env"] == {"TOSSUP": "${{ vars.TOSSUP }}"}
    environment = os.environ | {"TOSSUP": str(own / "of-tossup"), "GITHUB_BASE_REF": "main"}
    environment["PATH"] = f"{stand_ins(own / 'bin')}{os.pathsep}{os.environ['PATH']}"
    del environment["PYTHONPATH"]
    steps = {name: job["steps"] for name, job in workflow["jobs"].items()}
    for script in (step["run"] for step in steps["cpu"] if "run" in step):
        done = subprocess.run(
            ["bash", "-ec", script], cwd=own / "checkout", env=environment, text=True,
            capture_output=True,
        )  # fmt: skip
    assert " worse, 6 of 6 compared\n" in done.stdout, done.stdout + done.stderr
    case = "mlp batch=1 seqlen=64 dim=64 hidden=128 dtype=fp32"
    assert f"{case}, backward: " in done.stdout
    assert git("log", "--format=%H", "-1", at=own / "tossup") == new

    *setup, last = steps["gpu"]
    assert setup == steps["cpu"][:-1]
    import_workloads(["my_workloads"])
    cases = re.findall("--case '(.*?)'", last["run"])
    assert [len(gate.cases_of(case.split())) for case in cases] == [3, 3, 3]


def repository(folder: Path) -> list[str]:
    """Makes one of a folder; the first and the second commit on its branch main."""
    git("init", "--quiet", "--initial-branch=main", at=folder)
    git("add", ".", at=folder)
    for message in ("first", "second"):
        git("commit", "--quiet", "--allow-empty", "--message", message, at=folder)
    return git("log", "--reverse", "--format=%H", at=folder).splitlines()


def git(*words: str, at: Path) -> str:
    command = ["git", "-c", "user.name=n", "-c", "user.email=e@example.com", *words]
    done = subprocess.run(command, cwd=at, text=True, stdout=subprocess.PIPE, check=True)
    return done.stdout.strip()


def stand_ins(folder: Path) -> Path:
    """This interpreter as `python`, and a `pip` that does nothing."""
    folder.mkdir()
    for name, command in (("pip", "true"), ("python", f'exec {sys.executable} "$@"')):
        path = folder / name
        path.write_text(f"#!/bin/sh\n{command}\n")
        path.chmod(0o755)
    return folder
