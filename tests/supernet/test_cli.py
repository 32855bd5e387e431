"""The chain as a user runs it: train, search, eval, convert, by command line."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from tests.supernet.tiny import run_values
from tossup.supernet.cli import main
from tossup.supernet.config import RunConfig, SearchConfig, validate
from tossup.supernet.conversion import load_checkpoint
from tossup.supernet.data import build_data
from tossup.supernet.evaluate import evaluate_model, evaluate_placements
from tossup.supernet.search import all_placements
from tossup.supernet.search.run import run_search
from tossup.supernet.train import latest_checkpoint, train


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


def test_eval_measures_what_it_is_told_to(trained, capsys):
    run = run_of(trained)
    model = load_checkpoint(latest_checkpoint(run.output))
    batches = build_data(run.data, run.seed).evaluation(8, 4)
    placement = ("mamba", "attention", "mamba", "mamba")
    for extra, expected in (([], None), (["placement=" + json.dumps(placement)], placement)):
        assert main(["eval", str(trained), *extra]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed["metrics"] == dict(evaluate_model(model, batches, expected).metrics)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["train", "{path}", "training.steps=-1"], "training.steps: .* greater than 0, got -1"),
        (["search", "{path}", "search.budgets=[5]"], "search.budgets asks for 5 = 5 layers"),
        (["search", "{path}", "search.budgets=[1, 1]"], "search.budgets has 2 entries"),
        (["search", "{path}", "output=nowhere"], "nowhere holds no checkpoint"),
        (["search", "{path}", "search=null"], "search: is required"),
        (["eval", "absent.yaml"], "cannot read absent.yaml"),
    ],
)
def test_wrong_configuration_is_one_line_and_exit_code_2(trained, capsys, arguments, sentence):
    code = main([argument.format(path=trained) for argument in arguments])
    error = capsys.readouterr().err
    assert code == 2
    assert len(error.splitlines()) == 1
    import re

    assert re.search(sentence, error)


def test_a_search_needs_a_supernet(trained, tmp_path):
    values = run_values(tmp_path)
    values["model"]["placement"] = ["mamba", "mamba"]
    run = validate(values, RunConfig)
    train(run)
    search = validate(yaml.safe_load(trained.read_text())["search"], SearchConfig)
    with pytest.raises(ValueError, match=r"search takes a run whose model\.mixer"):
        run_search(run, search)
