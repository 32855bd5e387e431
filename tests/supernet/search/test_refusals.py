"""What a search refuses, in one sentence, before or while it runs."""

import math

import pytest
from pydantic import ValidationError

from tests.supernet.search.tables import (
    FINGERPRINTS,
    QUALITY,
    Table,
    config_of,
    peaked,
    space_of,
)
from tossup.supernet.errors import ConfigError
from tossup.supernet.search import (
    Objective,
    SearchSpace,
    beam_search,
)
from tossup.supernet.search.journal import Journal


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ([], r"a budget for one of the mixers \['a', 'b', 'c'\] or more, but .* got 0 budgets"),
        ([1, 1, 1], "but not for all, as one fills the other layers, got 3 budgets"),
        ({"a": 1, "b": 1, "c": 1}, "but not for all, .* got 3 budgets"),
        ({"a": 1, "b": 1, "foo": 1}, "budgets names 'foo'"),
        ([0], "gives 'a' 0 layers; it must be at least 1"),
        ([1, -2], "gives 'b' -2 layers; it must be at least 1"),
        ([2, 3], r"^budgets takes the model's 4 layers at most, got 2 \+ 3$"),
        ({"x": 1}, r"names 'x'; the mixers are \['a', 'b', 'c'\]"),
        ({"c": 5}, "^budgets takes the model's 4 layers at most, got 5$"),
        ([2], r"leaves out \['b', 'c'\]: name the one that takes all other layers as filler, or"),
    ],
)
def test_budgets_that_the_model_cannot_meet_are_named(budgets, message):
    with pytest.raises(ConfigError, match=message):
        SearchSpace.from_budgets(4, ["a", "b", "c"], budgets)


@pytest.mark.parametrize("filler", ["a", "d"])
def test_a_filler_is_one_of_those_without_a_budget(filler):
    with pytest.raises(
        ConfigError, match=rf"search.filler takes one of \['b', 'c'\], .*'{filler}'"
    ):
        SearchSpace.from_budgets(4, ["a", "b", "c"], [1], filler, "search.budgets")


def test_mixers_need_different_names():
    with pytest.raises(ConfigError, match="different names"):
        SearchSpace.from_budgets(4, ["a", "a"], [1])


def test_a_journal_that_cannot_be_opened_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "j"):
        with pytest.raises(ConfigError, match=f"cannot open the journal {path}: "):
            Journal(path, Table(peaked), FINGERPRINTS, 1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused_and_not_recorded(tmp_path, value):
    def quality(placement):
        return value if placement[3] == "attention" else 0.0

    with pytest.raises(ConfigError, match="accuracy of placement window/window/window/attention"):
        beam_search(Table(quality), space_of(4, [1]), QUALITY)
    path = tmp_path / "j"
    with Journal(path, Table(quality), FINGERPRINTS, 2) as journal:
        with pytest.raises(ConfigError, match="a search needs finite scores"):
            beam_search(journal, space_of(4, [1]), QUALITY)
    assert len(path.read_bytes().splitlines()) == 2  # the first chunk, which was sound


def test_an_unknown_metric_is_named_with_those_there_are():
    with pytest.raises(ConfigError, match=r"'perplexity'; .* reports \['accuracy', 'loss'\]"):
        beam_search(Table(peaked), space_of(4, [1]), Objective("perplexity", True))


def test_a_score_function_must_answer_for_every_placement():
    with pytest.raises(ValueError, match="3 scores for 4 placements"):
        beam_search(lambda p: Table(peaked)(p)[1:], space_of(4, [1]), QUALITY)


@pytest.mark.parametrize(
    "changes",
    [
        {"beam_width": 0},
        {"initial_beam_width": -1},
        {"early_stop_threshold": -0.1},
        {"method": "evolution"},
        {"candidates_per_forward": 0},
        {"budgets": [True]},
        {"budget": [1]},
        {"score_metric": "acuracy"},
        {"early_stop_threshold": math.inf},
    ],
)
def test_the_configuration_refuses_what_it_does_not_know(tmp_path, changes):
    with pytest.raises(ValidationError, match=next(iter(changes))):
        config_of(tmp_path, **({"budgets": [1]} | changes))


def test_the_configuration_has_the_seeds_defaults(tmp_path):
    config = config_of(tmp_path, [1])
    assert (config.beam_width, config.initial_beam_width) == (12, 12)
    assert (config.early_stop, config.early_stop_threshold) == (False, 0.001)
    assert config.higher_is_better is True
    assert config.output_checkpoint_path is None
    assert config.journal(tmp_path) == tmp_path / "search.journal.jsonl"


@pytest.mark.parametrize("metric, higher", [("loss", True), ("accuracy", False)])
def test_the_direction_has_to_fit_the_metric(tmp_path, metric, higher):
    with pytest.raises(ValidationError, match=f"got {higher} with {metric}"):
        config_of(tmp_path, [1], score_metric=metric, higher_is_better=higher)
    config_of(tmp_path, [1], score_metric=metric, higher_is_better=not higher)


def test_standard_errors_need_two_samples(tmp_path):
    with pytest.raises(ValidationError, match="two samples or more in all, got 1 of 1"):
        config_of(tmp_path, [1], batches=1, batch_size=1)
    assert config_of(tmp_path, [1], batches=2, batch_size=1).batches == 2
