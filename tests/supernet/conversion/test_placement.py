"""One mixer of every layer, taken out of a supernet."""

import itertools

import pytest
import torch

from tests.supernet.conversion.checkpoints import (
    ATTENTION,
    assert_same_tensors,
    logits,
    shaken,
    supernet,
)
from tossup.supernet.checkpoint import model_tensors
from tossup.supernet.config import ModelConfig
from tossup.supernet.conversion import (
    load_checkpoint,
    place,
    save_checkpoint,
)
from tossup.supernet.model import SupernetModel


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_placement_survives_export_and_import(tied, tmp_path):
    model = supernet(tie_embeddings=tied)
    for placement in itertools.product(model.mixer_names, repeat=3):
        placed = place(model, placement)
        assert placed.config.placement == placement and not placed.config.is_supernet
        assert (placed.lm_head.weight is placed.embed_tokens.weight) is tied
        expected = logits(model, placement=placement)
        assert torch.equal(logits(placed), expected)
        formats = ["tossup", "apriel_hybrid_ssm"]
        for name in formats + ["mistral"] * (set(placement) == {"attention"}):
            save_checkpoint(model, tmp_path / name, name, placement)
            again = load_checkpoint(tmp_path / name)
            assert again.config.placement == placement
            assert_same_tensors(model_tensors(again), model_tensors(placed))
            assert torch.equal(logits(again), expected)


def test_the_model_and_its_placement_share_nothing():
    model = supernet()
    before = logits(model)
    with torch.no_grad():
        for parameter in place(model, ("attention",) * 3).parameters():
            parameter.zero_()
    assert torch.equal(logits(model), before)


def test_no_random_number_is_drawn():
    model, state = supernet(), torch.get_rng_state()
    place(model, ("mamba",) * 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_whole_supernet_is_kept(tmp_path):
    model = supernet()
    save_checkpoint(model, tmp_path / "out")
    again = load_checkpoint(tmp_path / "out", dispatch="dense")
    assert again.config == model.config
    assert_same_tensors(model_tensors(again), model_tensors(model))


def test_mixers_of_one_configuration_under_two_names(tmp_path):
    model = supernet({"first": ATTENTION, "second": ATTENTION | {"head_dim": 8}})
    placement = ("second", "first", "second")
    save_checkpoint(model, tmp_path / "out", "mistral", placement)
    assert torch.equal(
        logits(load_checkpoint(tmp_path / "out")), logits(model, placement=placement)
    )


def test_a_model_of_one_plain_mixer(tmp_path):
    config = supernet().config.model_dump() | {"mixer": ATTENTION}
    model = shaken(SupernetModel(ModelConfig(**config)))
    save_checkpoint(model, tmp_path / "out", "mistral")
    assert torch.equal(logits(load_checkpoint(tmp_path / "out")), logits(model))
