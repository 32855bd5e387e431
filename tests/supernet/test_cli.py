"""The chain as a user runs it: train, search, eval, convert, by command line."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import triton
import yaml
from tqdm import tqdm

import tossup
from tests.supernet.tiny import run_values
from tossup.autotune import machine
from tossup.supernet.cli import main
from tossup.supernet.config import RunConfig, SearchConfig
from tossup.supernet.conversion import load_checkpoint
from tossup.supernet.data import build_data
from tossup.supernet.evaluate import evaluate_model, evaluate_placements
from tossup.supernet.loader import validate
from tossup.supernet.run_folder import latest_checkpoint
from tossup.supernet.search import all_placements
from tossup.supernet.search.journal import Fingerprints, Journal
from tossup.supernet.search.run import run_search
from tossup.supernet.train import train
from tossup.supernet.tuning import workloads_of


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trained supernet of four layers and the file that describes it."""
    folder = tmp_path_factory.mktemp("run")
    values = run_values(folder / "run", layers=4, learning_rate=1e-2, steps=30)
    values["search"] = {
        "budgets": [2],
        "score_metric": "loss",
        "higher_is_better": False,
        "batches": 3,
        "batch_size": 5,
        "candidates_per_forward": 3,
        "beam_width": 2,
        "initial_beam_width": 3,
        "output_path": str(folder / "search.json"),
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    assert main(["train", str(path)]) == 0
    return path


def run_of(path):
    return validate(yaml.safe_load(path.read_text()), RunConfig)


def test_many_placements_in_one_forward_score_as_each_alone(trained):
    run = run_of(trained)
    model = load_checkpoint(latest_checkpoint(run.output))
    batches = build_data(run.data, run.seed).evaluation(3, 5)
    placements = all_placements(4, model.mixer_names)
    together = evaluate_placements(model, batches, placements)
    for placement, score in zip(placements, together, strict=True):
        alone = evaluate_model(model, batches, placement)
        assert score.metrics == pytest.approx(alone.metrics, rel=1e-5)
        assert score.standard_errors == pytest.approx(alone.standard_errors, rel=1e-3)
    labels = torch.cat([labels for _, labels in batches])
    logits = torch.cat([model.eval()(tokens, placement=placements[5]) for tokens, _ in batches])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert together[5].metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    right = (logits.argmax(-1) == labels)[labels != -100].double().mean()
    assert together[5].metrics["accuracy"] == pytest.approx(right.item())


def test_search_writes_the_best_placement_as_a_checkpoint(trained, tmp_path, capsys):
    export = tmp_path / "export"
    result = tmp_path / "search.json"
    arguments = [
        "search",
        str(trained),
        f"search.output_checkpoint_path={export}",
        "search.output_checkpoint_format=apriel_hybrid_ssm",
        f"search.output_path={result}",
        "search.method=exhaustive",
    ]
    assert main(arguments) == 0
    final = json.loads(result.read_text())["final_configuration"]
    assert f"loss {final['score']:.6g}: {' '.join(final['placement'])}" in capsys.readouterr().out

    run = run_of(trained)
    batches = build_data(run.data, run.seed).evaluation(3, 5)
    model = load_checkpoint(latest_checkpoint(run.output))
    scores = {
        placement: evaluate_model(model, batches, placement).metrics["loss"]
        for placement in all_placements(4, model.mixer_names)
        if placement.count("attention") == 2
    }
    best = min(scores, key=scores.get)
    assert tuple(final["placement"]) == best
    assert final["cost"] == model.flops_per_token(16, best)
    exported = load_checkpoint(export)
    assert exported.config.placement == best
    assert torch.equal(exported.eval()(batches[0][0]), model.eval()(batches[0][0], placement=best))


@pytest.mark.parametrize("watched", [False, True])
def test_bars_are_drawn_where_somebody_watches(trained, tmp_path, monkeypatch, capsys, watched):
    bar = lambda delay=0, **options: tqdm(**options)  # noqa: E731, of short searches as well
    for module in ("train", "search.run"):
        monkeypatch.setattr(f"tossup.supernet.{module}.tqdm", bar)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: watched)
    for words in (["train", f"output={tmp_path}"], ["search", f"search.output_path={tmp_path}/s"]):
        command, *overrides = words
        assert main([command, str(trained), *overrides]) == 0
        drawn = capsys.readouterr().err
        assert (f"{command}: 100%" in drawn) if watched else drawn == ""


def test_killed_search_resumes_to_the_same_bytes(trained, tmp_path):
    outputs = [tmp_path / "whole.json", tmp_path / "killed.json"]
    assert main(["search", str(trained), f"search.output_path={outputs[0]}"]) == 0
    journal = outputs[1].with_suffix(".journal.jsonl")
    command = [sys.executable, "-m", "tossup.supernet", "search", str(trained)]
    command += [f"search.output_path={outputs[1]}"]
    kills = 0
    while True:
        size = journal.stat().st_size if journal.exists() else 0
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        while process.poll() is None and kills < 2:
            if journal.exists() and journal.stat().st_size > size:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.001)
        _, errors = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors.decode()
    assert kills >= 1
    assert outputs[1].read_bytes() == outputs[0].read_bytes()
    assert journal.read_bytes() == outputs[0].with_suffix(".journal.jsonl").read_bytes()


def test_a_search_file_of_its_own_names_the_run(trained, tmp_path, capsys):
    search = yaml.safe_load(trained.read_text())["search"]
    search |= {"training_config": str(trained), "output_path": str(tmp_path / "search.json")}
    path = tmp_path / "search.yaml"
    path.write_text(yaml.safe_dump(search))
    assert main(["search", str(path)]) == 0
    del search["training_config"]
    path.write_text(yaml.safe_dump(search))
    assert main(["search", str(path)]) == 2
    assert "training_config: is required" in capsys.readouterr().err


def test_outputs_follow_the_run_and_convert_takes_a_run(trained, tmp_path):
    """Moved whole by output=: the search's files stand in the run's folder."""
    values = yaml.safe_load(trained.read_text())
    del values["search"]["output_path"]
    values["output"] = str(tmp_path / "moved")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    assert main(["train", str(path)]) == 0
    assert main(["search", str(path)]) == 0
    run = tmp_path / "moved"
    assert {"search.json", "search.journal.jsonl"} <= {file.name for file in run.iterdir()}
    words = [f"input={run}", f"placement={run}/search.json", f"output={tmp_path}/best"]
    assert main(["convert", *words]) == 0
    final = json.loads((run / "search.json").read_text())["final_configuration"]
    assert list(load_checkpoint(tmp_path / "best").config.placement) == final["placement"]
    assert main(["eval", str(path), f"checkpoint={run}"]) == 0  # a run, as for convert


@pytest.mark.parametrize("command", ["train", "search", "convert", "eval"])
def test_help_names_every_key(command, capsys):
    assert main([command, "--help"]) == 0
    keys = capsys.readouterr().out.partition("keys:")[2]
    unexplained = [line for line in keys.splitlines() if line and not line.endswith(")")]
    assert all(re.search(r"type: \w+$|type \w+$", line) for line in unexplained)
    if command == "convert":
        assert "\n  input: required" in keys
        return
    assert "\n  training.dispatch: host  (device | host | dense; who follows" in keys
    assert "\n  model.mixer.mixers.NAME.window_size: null  (tokens a query sees" in keys
    assert "\n  search.budgets: required" in keys and "\n  data.pairs: 8" in keys
    assert ("\n  checkpoint: null" in keys) == (command == "eval")
    assert (
        keys.count("d_conv: 4") == 2
        and ".*: as model.mixer.mixers.NAME.*, with type mamba1" in keys
    )


def test_a_reader_that_has_enough_ends_it_without_a_word():
    command = [sys.executable, "-m", "tossup.supernet", "train", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_ctrl_c_is_one_line(trained, capsys, monkeypatch):
    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr("tossup.supernet.train.train", interrupted)
    assert main(["train", str(trained)]) == 130
    assert capsys.readouterr().err == "tossup train: stopped; the same command goes on\n"
    monkeypatch.setattr("tossup.supernet.benchmark.benchmark", interrupted)
    assert main(["bench", "linear"]) == 130
    assert capsys.readouterr().err == "tossup bench: stopped\n"


def test_eval_measures_what_it_is_told_to(trained, capsys):
    run = run_of(trained)
    model = load_checkpoint(latest_checkpoint(run.output))
    batches = build_data(run.data, run.seed).evaluation(8, 4)
    placement, alike = ("mamba", "attention", "mamba", "mamba"), ("mamba",) * 4
    assert main(["search", str(trained)]) == 0
    result = run.search.output_path
    found = json.loads(result.read_text())["final_configuration"]["placement"]
    capsys.readouterr()
    for extra, expected in (
        ([], None),
        (["placement=" + json.dumps(placement)], placement),
        ([f"placement={result}"], found),
        (["placement=mamba"], alike),
    ):
        assert main(["eval", str(trained), *extra]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed["metrics"] == dict(evaluate_model(model, batches, expected).metrics)


@pytest.fixture
def scene(trained, tmp_path):
    """A folder with copies of the run's file and folder, to be spoilt."""
    shutil.copytree(run_of(trained).output, tmp_path / "run")
    values = yaml.safe_load(trained.read_text())
    values["output"] = str(tmp_path / "run")
    values["search"]["output_path"] = str(tmp_path / "search.json")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "empty").mkdir()
    return tmp_path


def spoil(scene, spoilt):
    """Give files of the scene other contents; None takes one away."""
    for name, content in spoilt.items():
        (path,) = scene.glob(name) if "*" in name else (scene / name,)
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)


def one_line(capsys):
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    return line


WEIGHTS = "run/checkpoints/*30/model.safetensors"
MOMENTS = "run/checkpoints/*30/optimizer.safetensors"
DESCRIPTION = "run/checkpoints/*30/config.json"
LATIN = {"run.yaml": "output: Zürich".encode("latin-1")}


@pytest.mark.parametrize(
    "command, sentence, spoilt",
    [
        # configurations
        ("train training.steps=-1", "training.steps: input should be greater than 0, got -1", {}),
        ("train training.frozen=[1,", r"training.frozen=\[1, is not YAML", {}),
        ("train", "run.yaml is not UTF-8 at byte 9", LATIN),
        ("train training.betas=[0.9,2.0]", "training.betas.1: .* got 2.0", {}),
        (
            "train training.learning_rate=.inf",
            "learning_rate: .* a finite number, got inf",
            {},
        ),
        ("train model.mixer.mixers.attention.head_dim=3", "head_dim must be even", {}),
        ("train model.mixer.mixers.mamba.dt_rank=foo", "dt_rank: .* or 'auto', got 'foo'", {}),
        ("train search.training_config=x.yaml", "search.training_config goes in a file", {}),
        ("train output={}/new training.frozen=[x.*]", "training.frozen takes .* 'x.*'", {}),
        ("train output={}/new training.frozen=['*']", "training.frozen", {}),
        *(
            (f"{command} training.device={device}", f"training.device.* got '{device}'", {})
            for command in ("train output={}/new", "eval", "search")
            for device in ("gpu", "xpu", "meta")
        ),
        ("eval training.device=gpu", "takes a device .*, such as cpu or cuda, got 'gpu'$", {}),
        ("search search.budgets=3", "search.budgets: .*, got 3", {}),
        ("search search.budgets=[5]", ": search.budgets takes the model's 4 layers .*, got 5$", {}),
        ("search search.budgets=[1,1]", ": search.budgets takes a budget .*, got 2 budgets", {}),
        (
            "search search.score_metric=acuracy",
            "'loss' or 'accuracy', got 'acuracy'",
            {},
        ),
        (
            "search search.method=exhaustive search.exhaustive_limit=5",
            "allow 6 .* search.exhaustive_l",
            {},
        ),
        ("search search.batches=1 search.batch_size=1", "two samples or more", {}),
        ("search search=null", "search: is required", {}),
        ("search model.norm_eps=0.1", "model.norm_eps is 0.1, .* was trained with 1e-05", {}),
        ("search model.num_layers=3", "model.num_layers is 3, .* was trained with 4", {}),
        ("eval placement=[attention]", "placement takes one mixer name for each of the 4", {}),
        ("eval placement=mambo", r"placement takes one .* got 'mambo', and no such file is", {}),
        ("eval placement=7", "placement: takes a list of mixer names, one name .*, got 7", {}),
        ("eval placement=[gdn,mamba,mamba,mamba]", "placement takes names .* got 'gdn'", {}),
        (
            "eval data.vocab_size=64 model.vocab_size=64",
            "64 tokens or more, got one of 32",
            {},
        ),
        ("eval training.evaluation_batches=1 training.batch_size=1", "two samples or more", {}),
        # folders and files
        ("train output={}/run.yaml", "cannot write in .*run.yaml: ", {}),
        ("search output={}/nowhere", "nowhere holds no checkpoint", {}),
        ("search search.output_path={}/empty", ": search.output_path takes a file, got", {}),
        (
            "search search.output_path={}/run.yaml/x",
            ": search.output_path: cannot make the folder",
            {},
        ),
        ("search search.output_path={}/run/config.yaml", "config.yaml is not JSON", {}),
        ("search", ": search.output_path takes a new file or a .* neither", {"search.json": b"{}"}),
        ("search search.journal_path={}/empty", "cannot open the journal .*empty: ", {}),
        ("search search.output_checkpoint_path={}", "output takes a new folder, or one", {}),
        ("search", "search.journal.jsonl, line 1: not a record", {"search.journal.jsonl": b"x\n"}),
        ("train", "config.yaml does not describe .* is not YAML", {"run/config.yaml": b"a: ["}),
        ("train", "config.yaml does not describe .* is required", {"run/config.yaml": b""}),
        ("train", "config.yaml does not describe .* a mapping", {"run/config.yaml": b"run"}),
        ("train", "metrics.jsonl: line 1 is no record", {"run/metrics.jsonl": b"garbage\n"}),
        ("train", "cannot read tensors from .*optimizer", {MOMENTS: None}),
        ("train", "cannot read tensors from .*optimizer", {MOMENTS: b"garbage"}),
        ("eval", "cannot read tensors from .*model.safetensors", {WEIGHTS: None}),
        ("eval", "cannot read tensors from .*model.safetensors", {WEIGHTS: b"garbage"}),
        ("search", "cannot read tensors from .*model.safetensors", {WEIGHTS: b"\x08" + bytes(20)}),
        ("eval", "config.json takes the key model", {DESCRIPTION: b'{"model_type": "tossup"}'}),
        ("eval", "config.json is not JSON", {DESCRIPTION: b"{"}),
        ("eval", "cannot read .*config.json: No such file", {DESCRIPTION: None}),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(scene, capsys, command, sentence, spoilt):
    spoil(scene, spoilt)
    name, *overrides = command.format(scene).split()
    assert main([name, str(scene / "run.yaml"), *overrides]) == 2
    assert re.search(sentence, one_line(capsys))


@pytest.mark.parametrize(
    "output, sentence",
    [
        (".", "output takes a folder's own name, got '.'"),
        ("..", "output takes a folder's own name, got '..'"),
        ("link", "output takes a folder's own name, got 'link'"),
        ("run", "output takes a new folder, or one that holds a checkpoint .* run is neither"),
        ("run.yaml", "run.yaml is neither"),
        ("run.yaml/out", "run.yaml.*: Not a directory"),
    ],
)
def test_convert_refuses_what_it_cannot_replace(scene, capsys, monkeypatch, output, sentence):
    monkeypatch.chdir(scene)
    (scene / "link").symlink_to("empty")
    assert main(["convert", f"input={latest_checkpoint(scene / 'run')}", f"output={output}"]) == 2
    assert re.search(sentence, one_line(capsys))
    assert (scene / "run" / "metrics.jsonl").exists() and (scene / "link").is_symlink()


def test_a_journal_in_use_is_one_line_and_exit_code_2(scene, capsys):
    with Journal(scene / "search.journal.jsonl", no_score, Fingerprints("m", "d", {}), 1):
        assert main(["search", str(scene / "run.yaml")]) == 2
    assert "is in use by another search" in one_line(capsys)


def no_score(placements):
    raise AssertionError("nothing is to be scored")


def test_eval_of_an_ordinary_model_takes_its_own_placement(scene, capsys):
    own, other = "[mamba,mamba,attention,mamba]", "[mamba,mamba,mamba,mamba]"
    words = [f"input={latest_checkpoint(scene / 'run')}", f"output={scene}/placed"]
    assert main(["convert", *words, f"placement={own}"]) == 0
    words = ["eval", str(scene / "run.yaml"), f"checkpoint={scene}/placed"]
    assert main([*words, f"placement={own}"]) == 0
    capsys.readouterr()
    assert main([*words, f"placement={other}"]) == 2
    assert "this one holds a model of one placement" in one_line(capsys)


def test_eval_of_a_plain_mixer_takes_its_name(tmp_path, capsys):
    values = run_values(tmp_path / "run", steps=1)
    values["model"]["mixer"] = {"type": "attention", "heads": 4}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    assert main(["train", str(path)]) == 0
    assert main(["eval", str(path), "placement=[attention,attention]"]) == 0
    capsys.readouterr()
    assert main(["eval", str(path), "placement=[attention]"]) == 2
    assert "placement takes one mixer name for each of the 2 layers" in one_line(capsys)


def test_a_search_reuses_scores_of_the_same_checkpoint_data_and_settings_alone(scene, capsys):
    journal = scene / "search.journal.jsonl"

    def evaluated(*overrides):
        """How many placements a search scores that no search before it has scored."""
        (scene / "search.json").unlink(missing_ok=True)  # of other settings
        before = len(journal.read_bytes().splitlines()) if journal.exists() else 0
        assert main(["search", str(scene / "run.yaml"), *overrides]) == 0
        return len(journal.read_bytes().splitlines()) - before

    other = f"output={scene}/other"
    assert main(["train", str(scene / "run.yaml"), other, "training.steps=31"]) == 0
    assert evaluated() > 0
    assert evaluated() == 0
    for overrides in (
        [other],  # the same model, trained on
        ["seed=4"],  # other data
        ["search.batches=2"],
        ["search.batch_size=4"],
        ["search.candidates_per_forward=2"],
        ["training.dispatch=dense"],
    ):
        assert evaluated(*overrides) > 0, overrides
        assert evaluated(*overrides) == 0, overrides


def test_a_finished_search_is_not_lost_to_another(scene, capsys):
    search = ["search", str(scene / "run.yaml")]
    assert main(search) == 0
    result = scene / "search.json"
    before = result.read_bytes()
    journal = (scene / "search.journal.jsonl").read_bytes()
    capsys.readouterr()
    for override, sentence in (
        ("search.method=exhaustive", "method is beam, not exhaustive: give another "),
        ("search.budgets=[1]", "budgets is attention: 2, not attention: 1: give another search"),
        ("search.budgets={mamba: 2}", "budgets is attention: 2, not mamba: 2: give another search"),
        (
            "search.batches=2",
            "batches is 3, not 2: give .* search.output_path, or remove the file$",
        ),
        ("seed=4", "data is .*, not .*: give another search.output_path, or remove the file$"),
    ):
        assert main([*search, override]) == 2
        assert re.search(f"search.json holds a search whose {sentence}", one_line(capsys))
    assert (scene / "search.journal.jsonl").read_bytes() == journal
    assert main([*search, "search.budgets=[1]", f"search.output_path={scene}/other.json"]) == 0
    assert main([*search, "search.candidates_per_forward=2"]) == 0  # which changes no score
    assert json.loads(result.read_bytes())["config"] == json.loads(before)["config"]


def test_a_runs_folder_is_its_configuration_wherever_it_stands(scene, capsys):
    """Here it is a copy, whose config.yaml names the folder that it was copied from."""
    folder = (scene / "run").rename(scene / "a run: moved")
    assert main(["eval", str(folder)]) == 0
    expected = json.loads(capsys.readouterr().out)
    words = ["eval", str(scene / "run.yaml"), f"output={json.dumps(str(folder))}"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out) == expected
    assert main(["search", str(folder), "search.output_path=null"]) == 0
    assert (folder / "search.json").exists()
    capsys.readouterr()
    assert main(["eval", str(scene / "empty")]) == 2
    assert re.search("CONFIG takes a YAML file or .* without config.yaml$", one_line(capsys))


@pytest.mark.parametrize("command", ["train", "search", "eval", "latency"])
def test_nothing_at_all_lacks_a_configuration(command, capsys):
    assert main([command]) == 2
    assert one_line(capsys) == (
        f"tossup {command}: CONFIG is required, a YAML file or the folder of a run"
    )


def test_a_folder_that_cannot_be_written_is_told_by_its_own_name(trained, capsys):
    run = run_of(trained)
    assert main(["convert", f"input={run.output}", "output=/proc/out"]) == 2
    assert one_line(capsys) == "tossup convert: /proc/out: No such file or directory"


def test_a_file_name_may_hold_an_equals_sign(scene, capsys):
    path = (scene / "run.yaml").rename(scene / "steps=30.yaml")
    assert main(["eval", str(path)]) == 0
    assert main(["eval", "absent.yaml"]) == 2
    assert "cannot read absent.yaml: No such file" in one_line(capsys)


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"tossup {tossup.__version__}\n"


def test_the_models_need_no_file_locks():
    """fcntl is POSIX's alone; a StochasticMixer is to be had everywhere."""
    code = """
import sys
sys.modules["fcntl"] = None
import tossup
print(*(getattr(tossup, name).__name__ for name in tossup.__all__ if name[0].isupper()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "StochasticMixer" in done.stdout, done.stderr


def test_a_search_needs_a_supernet(trained, tmp_path):
    values = run_values(tmp_path)
    values["model"]["placement"] = ["mamba", "mamba"]
    run = validate(values, RunConfig)
    train(run)
    search = validate(yaml.safe_load(trained.read_text())["search"], SearchConfig)
    with pytest.raises(ValueError, match=r"search takes a run whose model\.mixer"):
        run_search(run, search)


def test_bench_races_a_shape_of_ones_own(capsys, monkeypatch):
    words = ["bench", "linear", "seqlen=8", "in_features=16", "out_features=8", "dtype=fp32"]
    assert main([*words, "direction=wgrad"]) == 0
    printed = capsys.readouterr().out
    heading = "linear batch=1 seqlen=8 in_features=16 out_features=8 dtype=fp32, wgrad"
    assert heading in printed and f"torch {torch.__version__}" in printed
    assert re.search(r"torch +\S+ ms .* × our time", printed)
    assert main([*words, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [race["direction"] for race in record["races"]] == ["forward", "dgrad", "wgrad"]
    monkeypatch.setattr(machine, "commit", lambda: None)
    assert main([*words, "direction=wgrad"]) == 0
    assert "commit" not in capsys.readouterr().out
    for command in ("bench", "tune"):
        assert main([command, "--help"]) == 0
        told = capsys.readouterr().out
        assert "\n  attention, or flash_attention\n" in told
        assert "kv_heads: 8  (heads of keys and values; divides heads)" in told
        assert ("  direction: null  (forward" in told) is (command == "bench")
    assert main(["inspect", "--help"]) == 0
    told = capsys.readouterr().out
    assert "--arch sm_80 " in told and "--op accumulate adamw causal_conv1d " in told


def test_attention_goes_by_both_of_its_names(capsys, monkeypatch):
    words = ["seqlen=8", "heads=2", "kv_heads=2", "head_dim=16", "dtype=fp32", "direction=forward"]
    inspected = []

    def inspect(archs, ops, gpu):
        inspected.append(ops)
        return {}

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr("tossup.autotune.inspection.inspect", inspect)
    for name in ("attention", "flash_attention"):
        assert main(["bench", name, *words]) == 0
        assert "attention batch=1 seqlen=8 heads=2" in capsys.readouterr().out
        assert workloads_of([name, "seqlen=8"])[0].op == "attention"
        assert main(["inspect", "--op", name, "linear"]) == 0
    assert inspected == [["flash_attention", "linear"]] * 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "OP is required, one of attention"),
        (["linear", "heads=3"], "linear takes the keys batch, .*, direction, got 'heads'"),
        (["linear", "direction=backward"], "direction takes forward, dgrad, wgrad, got 'backward'"),
        (["linear", "--device", "nowhere"], "--device takes a device of this machine"),
    ],
)
def test_bench_says_what_is_wrong(words, message, capsys):
    assert main(["bench", *words]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_bench_has_no_time_for_a_wrong_result(monkeypatch, capsys):
    from tossup.autotune.workloads import linear

    monkeypatch.setattr(linear, "linear", lambda x, w, route: torch.zeros(1, 8, 8))
    words = ["linear", "seqlen=8", "in_features=8", "out_features=8", "dtype=fp32"]
    assert main(["bench", *words]) == 1
    assert capsys.readouterr().err.startswith("tossup bench: not timed: out is off by")
