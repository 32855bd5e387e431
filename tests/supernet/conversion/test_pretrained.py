"""Supernets that begin with the weights of a pretrained model."""

import json

import pytest
import torch

from tests.supernet.conversion.checkpoints import (
    logits,
    mistral,
    pretrained_mixers,
    supernet,
)
from tossup.supernet.checkpoint import model_tensors
from tossup.supernet.conversion import (
    load_into,
    save_checkpoint,
)
from tossup.supernet.errors import ConfigError


def test_the_main_mixer_receives_the_weights(tmp_path):
    theirs = mistral()
    theirs.save_pretrained(tmp_path / "in")
    model = supernet(pretrained_mixers(), layers=2, norm_eps=1e-6)
    others = {k: t.clone() for k, t in model_tensors(model).items() if ".mamba." in k}
    load_into(model, tmp_path / "in")
    torch.testing.assert_close(logits(model), logits(theirs).logits, rtol=0, atol=1e-5)
    assert others and all(torch.equal(model_tensors(model)[k], t) for k, t in others.items())


def test_what_ends_a_text_is_taken_over_where_nothing_was_said(tmp_path):
    mistral(eos_token_id=5, pad_token_id=4).save_pretrained(tmp_path / "in")
    model = supernet(pretrained_mixers(), layers=2, norm_eps=1e-6, pad_token_id=9)
    load_into(model, tmp_path / "in")
    assert (model.config.eos_token_id, model.config.pad_token_id) == (5, 9)
    save_checkpoint(model, tmp_path / "out", "mistral", ("base",) * 2)
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == 5


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ({"layers": 3}, "num_layers takes the pretrained model's 2, got 3"),
        ({"norm_eps": 1e-5}, "norm_eps takes the pretrained model's 1e-06, got 1e-05"),
        ({"heads": 8}, "heads of the main mixer base takes the pretrained model's 4, got 8"),
        ({"rope_theta": 1.0}, "rope_theta of the main mixer base takes .* 10000.0, got 1.0"),
        ({"window_size": 7}, "window_size of the main mixer base takes .* None, got 7"),
        ({"main": "mamba"}, "the main mixer mamba takes .* attention in layer 0, got mamba"),
        ({"placement": ("base",) * 2}, "pretrained weights go into a supernet; this model is"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit(model, sentence, tmp_path):
    mistral().save_pretrained(tmp_path / "in")
    attention = {k: v for k, v in model.items() if k in ("heads", "rope_theta", "window_size")}
    mixers = pretrained_mixers(**attention)
    if "main" in model:
        mixers = dict(reversed(mixers.items()))
    shape = {"layers": 2, "norm_eps": 1e-6}
    shape |= {k: v for k, v in model.items() if k not in attention and k != "main"}
    with pytest.raises(ConfigError, match=sentence):
        load_into(supernet(mixers, **shape), tmp_path / "in")
