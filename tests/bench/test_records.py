"""Records of races, the tables and plots made from them, and what builds the peers."""

import json
import re
import tarfile
from types import SimpleNamespace

import pytest
import torch
from torch.utils import cpp_extension

from bench import peers, record, table
from tossup.autotune.errors import WrongResult
from tossup.autotune.workloads import build


def entrant(seconds: float, **more) -> dict:
    times = {"median": seconds, "p20": seconds / 2, "p80": seconds * 2}
    return times | {"ratio": seconds / 1e-3, "tflops": 500.0, "share": 0.625} | more


def one_race(**more) -> dict:
    peers_of = {"fast": entrant(2e-3), "absent": {"untimed": "not built: no nvcc"}}
    entrants = {"ours": entrant(1e-3)} | peers_of
    return {"workload": "linear batch=1", "direction": "dgrad", "entrants": entrants} | more


def a_record(**more) -> dict:
    about = {"device": "NVIDIA H200", "packages": {"torch": "2.11.0"}, "commit": "abc"}
    races = [one_race(), {"workload": "linear", "direction": "wgrad", "failed": "off by 1"}]
    return about | {"time": "2026-01-02T03:04:05+00:00", "races": races} | more


def test_a_table_has_a_line_for_each_peer_and_names_what_was_not_timed():
    lines = table.markdown(a_record()).splitlines()
    assert lines[0].startswith("NVIDIA H200; torch 2.11.0; 2026-01-02, commit abc.")
    assert lines[2].endswith("| peer / ours | ours, TFLOP/s | of the floor |")
    assert lines[4] == ("| linear batch=1, dgrad | 1 (0.5–2) | fast | 2 (1–4) | 2 × | 500 | 62% |")
    assert lines[-1] == "Not timed: absent (not built: no nvcc); linear, wgrad (off by 1)."
    on_cpu = {"threads": 1, "cores": 2, "load": 0.75}
    unknown = {key: value for key, value in a_record().items() if key != "commit"}
    told = "NVIDIA H200; torch 2.11.0; 2026-01-02. Medians, and from 20 % to 80 % of the runs."
    assert [table.markdown(r).splitlines()[0] for r in (unknown, unknown | {"commit": None})] == (
        [told] * 2
    )
    of_cpu = table.markdown(a_record(**on_cpu)).splitlines()
    assert "threads: 1, load 0.8 on 2" in of_cpu[0] and of_cpu[4].endswith("| 2 × |")
    assert of_cpu[3].count("|") == of_cpu[4].count("|")
    assert lines[3].count("|") == lines[4].count("|")
    alone = one_race(entrants={"ours": entrant(5.0)})
    line = table.markdown(a_record(**on_cpu, races=[alone])).splitlines()[4]
    assert line == "| linear batch=1, dgrad | 5000 (2500–10000) | none | – | – |"


def test_a_plot_is_the_same_every_time(tmp_path):
    (path,) = table.plot(a_record(), tmp_path)
    first = path.read_bytes()
    assert path.name == "linear.svg" and b"linear on NVIDIA H200" in first
    table.plot(a_record(), tmp_path)
    assert path.read_bytes() == first


def test_a_wrong_result_has_a_reason_in_place_of_times(monkeypatch):
    workload = build("linear", {"seqlen": 8, "in_features": 8, "out_features": 8})

    class Race:
        def __init__(self, *arguments):
            pass

        def run(self, direction):
            if direction == "dgrad":
                raise WrongResult("dx is off by 1")
            return {"workload": workload.name, "direction": direction}

    monkeypatch.setattr(record, "Race", Race)
    monkeypatch.setattr(record, "shipped", lambda device: (workload,))
    cpu = torch.device("cpu")
    forward, dgrad, wgrad = record.race_op("linear", cpu, 0.0)
    assert "failed" not in forward and "failed" not in wgrad
    assert dgrad["failed"] == "dx is off by 1"
    assert not list(record.race_op("attention", cpu, 0.0))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--op liner", "OP takes attention, .* got 'liner'"),
        ("--seconds 0", "argument --seconds: takes a number of seconds above 0, got '0'"),
        ("--limit inf", "argument --limit: takes a number of seconds above 0, got 'inf'"),
        ("--workloads absent", "--workloads takes a module that can be imported, got 'absent'"),
    ],
)
def test_a_mistake_is_a_sentence(words, sentence, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["record", "--op", "flash_attention", "linear"])
    assert record.parse_arguments().op == ["attention", "linear"]
    monkeypatch.setattr("sys.argv", ["record", *words.split()])
    with pytest.raises(SystemExit) as end:
        record.parse_arguments()
    assert end.value.code == 2
    assert re.search(f"error: {sentence}", capsys.readouterr().err)


def test_a_process_that_ends_early_keeps_what_it_did(monkeypatch):
    options = SimpleNamespace(device="cpu", seconds=0.0, limit=5.0, workloads=[])

    def run(command, timeout):
        path = command[command.index("--append") + 1]
        open(path, "w").write('{"workload": "first"}\n')
        if timeout:
            raise record.subprocess.TimeoutExpired(command, timeout)
        return SimpleNamespace(returncode=3)

    monkeypatch.setattr(record.subprocess, "run", run)
    first, rest = record.in_process("linear", options)
    assert first == {"workload": "first"} and rest["failed"].startswith("what was left after 5 s")
    options.limit = 0
    assert record.in_process("linear", options)[1]["failed"] == "the process ended with 3"


def test_an_interrupted_record_is_written_and_ends(monkeypatch, tmp_path):
    """As device.sh interrupts it, whose time is short."""
    raced, other = [], record.subprocess.run

    def run(command, **options):
        if "--append" not in command:
            return other(command, **options)
        raced.append(command[command.index("--op") + 1])
        open(command[command.index("--append") + 1], "w").write(json.dumps(one_race()) + "\n")
        raise KeyboardInterrupt

    monkeypatch.setattr(record.subprocess, "run", run)
    monkeypatch.setattr(record.host, "measure", dict)
    monkeypatch.setattr(record.startup, "measure", dict)
    words = ["record", "--op", "linear", "rotary", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", words)
    assert record.main() == 1 and raced == ["linear"]
    (path,) = tmp_path.glob("*/*.json")
    first, rest = json.loads(path.read_text())["races"]
    assert first["workload"] == "linear batch=1" and rest["failed"].startswith("interrupted")


@pytest.mark.parametrize(
    ("number", "text"), [(0.94812, "0.948"), (12.04, "12"), (999.6, "1000"), (1234.5, "1234")]
)
def test_numbers_have_three_digits_and_no_exponent(number, text):
    assert table.digits(number) == text


def test_sources_come_from_the_newest_distribution(tmp_path):
    for version in ("1.0", "1.1"):
        folder = tmp_path / f"causal_conv1d-{version}/csrc"
        folder.mkdir(parents=True)
        for name in ("a.cpp", "b.cu", "c.h"):
            (folder / name).write_text(version)
        with tarfile.open(tmp_path / f"causal_conv1d-{version}.tar.gz", "w:gz") as archive:
            archive.add(folder.parent, folder.parent.name)
    sources = peers.sources_of("causal_conv1d", "csrc", tmp_path, tmp_path / "out")
    assert [path.name for path in sources] == ["a.cpp", "b.cu"]
    assert all(path.read_text() == "1.1" for path in sources)
    with pytest.raises(peers.NotBuilt, match=r"holds no mamba_ssm-\*.tar.gz"):
        peers.sources_of("mamba_ssm", "csrc", tmp_path, tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it would build")
def test_what_cannot_be_built_says_why(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    for name in peers.EXTENSIONS:
        said = peers.build(name, tmp_path, tmp_path)
        assert said == "not built: torch sees no GPU, and TORCH_CUDA_ARCH_LIST names none"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    assert peers.build(name, tmp_path, tmp_path) == "not built: there is no nvcc"
