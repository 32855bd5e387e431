"""What the README and the examples show is run as it stands there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tossup import load_checkpoint
from tossup.supernet.config import RunConfig
from tossup.supernet.loader import load_config

ROOT = Path(__file__).parents[1]


def test_the_snippets_of_the_readme_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    dim, state = 8, 4
    u, delta, z = torch.randn(3, 2, 5, dim)
    B, C = torch.randn(2, 2, 5, 1, state)
    names = {"u": u, "delta": delta, "z": z, "B": B, "C": C}
    names |= {"A": -torch.rand(dim, state), "D": torch.ones(dim)}
    names |= {"x": torch.randn(4, 5, 3), "weight": torch.randn(2, 3)}
    names["batches"] = [torch.randint(100, (4, 9)) for _ in range(3)]
    snippets = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL
    )
    assert len(snippets) == 8
    for snippet in snippets:
        exec(snippet, names)
        if "table.route" in snippet:
            taken = names["table"].table[3] == 1
            expected = (names["x"] @ names["weight"].mT)[taken]
            torch.testing.assert_close(names["y"][taken], expected)
    counts = names["router"].counts
    assert counts.sum() == 2 * 3 * 4
    tokens = names["batches"][0]
    found = [block.self_attn.main_mixer_name for block in names["llama"].model.layers]
    assert sorted(found) == ["attention", "mamba"]
    for block, name in zip(names["again"].model.layers, found, strict=True):
        block.self_attn.main_mixer_name = name
    saved, loaded = (names[name].eval()(tokens).logits for name in ("llama", "again"))
    assert torch.equal(saved, loaded)
    names["llama"].train()
    names["llama"](input_ids=tokens, labels=tokens).loss.backward()
    names["optimizer"].step()  # by the hook, which has drawn once
    assert counts.sum() == 2 * 4 * 4
    assert names["out"].shape == (2, 5, dim) and names["state"].shape == (2, dim, state)


@pytest.mark.parametrize("name", ["demo", "text"])
def test_the_examples_are_valid(name):
    load_config(ROOT / f"examples/{name}.yaml", (), RunConfig)


def test_the_demo_leaves_what_it_promises(tmp_path):
    """Cut short, so that its accuracies mean nothing; its files have to agree all the same."""
    words = [f"output={tmp_path}", "training.steps=5"]
    words += ["search.batches=2", "search.batch_size=8"]
    demo = subprocess.run(
        [sys.executable, ROOT / "examples/demo.py", *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert demo.returncode == 0, demo.stderr
    placements = json.loads((tmp_path / "placements.json").read_text())
    assert len(placements) == 16
    final = json.loads((tmp_path / "search.json").read_text())["final_configuration"]
    allowed = [p for p in placements if p["placement"].count("attention") == 1]
    assert final["score"] == pytest.approx(max(p["accuracy"] for p in allowed), abs=1e-6)
    export = load_checkpoint(tmp_path / "export")
    assert list(export.config.placement) == final["placement"]
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
