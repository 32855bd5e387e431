"""Files that were held out must not turn into ones that were trained on, or the other way round."""

import pytest
import yaml

from tests.supernet.tiny import run_values
from tossup.supernet.cli import main


@pytest.fixture
def run(tmp_path):
    """A run's configuration, and a file of its data; it was trained for two of its four steps."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(8):
        (texts / f"{number}.txt").write_text(f"{number} is a number. " * 20)
    values = run_values(tmp_path / "run", steps=4, checkpoint_every=2, evaluation_batches=1)
    values["model"]["vocab_size"] = 256
    values["data"] = {"type": "text", "paths": [str(texts)], "suffixes": [".txt"], "length": 16}
    values["search"] = {"budgets": [1], "score_metric": "loss", "higher_is_better": False}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    assert main(["train", str(config)]) == 0
    for half in (tmp_path / "run/checkpoints").glob("*4/*"):  # as if it had been killed
        half.unlink()
    (tmp_path / "run/checkpoints/00000004").rmdir()
    return config, texts / "8.txt"


@pytest.mark.parametrize("command", ["train", "search", "eval"])
def test_changed_data_are_refused_until_they_are_restored(command, run, capsys):
    config, added = run
    added.write_text("Eight is another. " * 20)
    assert main([command, str(config)]) == 2
    assert "data has changed since" in capsys.readouterr().err
    added.unlink()
    assert main([command, str(config)]) == 0


@pytest.mark.parametrize("command", ["search", "eval"])
def test_a_run_without_its_optimizer_is_measured_all_the_same(command, run, tmp_path, capsys):
    config, _ = run
    path = tmp_path / "run/checkpoints/00000002/optimizer.safetensors"
    path.write_bytes(b"garbage")
    assert main([command, str(config)]) == 2
    assert "cannot read tensors from" in capsys.readouterr().err
    path.unlink()
    assert main([command, str(config)]) == 0


@pytest.mark.parametrize("command", ["search", "eval"])
def test_other_data_may_be_measured_on(command, run):
    config, added = run
    added.write_text("Eight is another. " * 20)
    assert main([command, str(config), "data.length=12"]) == 0
