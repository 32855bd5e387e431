"""Every invalid value is refused with one sentence that names the key, the value, what is taken."""

import copy

import pytest
import yaml

from tossup.kernels.routing import Strategy
from tossup.supernet.config import RunConfig, StochasticMixerConfig
from tossup.supernet.errors import ConfigError
from tossup.supernet.loader import load_config

MIXERS = {
    "attention": {"type": "attention", "heads": 4},
    "mamba": {"type": "mamba", "d_inner": 32, "state_size": 8},
}
RUN = {
    "output": "runs/x",
    "model": {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_layers": 2,
        "intermediate_size": 64,
        "mixer": {"type": "stochastic", "mixers": MIXERS},
    },
    "data": {"type": "mqar", "vocab_size": 64, "length": 32, "pairs": 4},
    "training": {"steps": 2, "batch_size": 2},
}
SEARCH = {"budgets": [1], "score_metric": "accuracy", "output_path": "search.json"}


def write(tmp_path, **changes):
    values = copy.deepcopy(RUN)
    for path, value in changes.items():
        *parents, last = path.split("__")
        inner = values
        for part in parents:
            inner = inner[part]
        inner[last] = value
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_defaults_are_fast_llms():
    config = StochasticMixerConfig.model_validate({"mixers": MIXERS})
    assert config.sampling_strategy == "uniform"
    assert config.sampling_weights is None
    assert config.main_mixer_name is None and config.main == "attention"
    assert config.predefined_layouts == () and config.predefined_layout_probabilities == ()
    assert config.seed_shift == 501974169931277706872159392843


def test_strategy_carries_the_configuration_to_the_kernels():
    config = StochasticMixerConfig.model_validate(
        {
            "mixers": MIXERS,
            "sampling_strategy": "weighted",
            "sampling_weights": {"mamba": 3, "attention": 1},
            "main_mixer_name": "mamba",
            "predefined_layouts": [["mamba", "attention"]],
            "predefined_layout_probabilities": [0.25],
            "per_sample": True,
        }
    )
    assert config.strategy(2) == Strategy(
        mixers=2,
        kind="weighted",
        weights=(0.25, 0.75),
        layouts=((1, 0),),
        layout_probabilities=(0.25,),
        main=1,
        cheapest=1,
        per_sample=True,
    )
    with pytest.raises(ConfigError, match=r"each of the 3 layers, got a layout of 2"):
        config.strategy(3)


def test_overrides_are_yaml_values_at_dotted_keys(tmp_path):
    overrides = ("training.steps=7", "training.betas=[0.8, 0.9]", "model.placement=[mamba, mamba]")
    config = load_config(write(tmp_path), overrides, RunConfig)
    assert config.training.steps == 7
    assert config.training.betas == (0.8, 0.9)
    assert config.model.placement == ("mamba", "mamba")


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"model__mixer__mixers": {}}, "model.mixer.mixers: a stochastic mixer takes at least one"),
        (
            {"model__mixer__main_mixer_name": "gdn"},
            r"model.mixer: main_mixer_name takes one of the mixers \['attention', 'mamba'\], "
            "got 'gdn'",
        ),
        (
            {"model__mixer__sampling_strategy": "weighted"},
            "model.mixer: sampling_weights goes with .* got sampling_weights None with weighted",
        ),
        (
            {"model__mixer__sampling_weights": {"attention": 1, "mamba": 1}},
            "model.mixer: sampling_weights goes with .* with uniform",
        ),
        (
            {
                "model__mixer__sampling_strategy": "weighted",
                "model__mixer__sampling_weights": {"attention": 1},
            },
            r"model.mixer: sampling_weights takes a weight for each .* got \['attention'\]",
        ),
        (
            {
                "model__mixer__sampling_strategy": "weighted",
                "model__mixer__sampling_weights": {"attention": 0, "mamba": 0},
            },
            "model.mixer: sampling_weights takes finite weights with a positive sum",
        ),
        (
            {
                "model__mixer__sampling_strategy": "weighted",
                "model__mixer__sampling_weights": {"attention": -1, "mamba": 2},
            },
            "model.mixer.sampling_weights.attention: .* greater than or equal to 0, got -1",
        ),
        (
            {"model__mixer__sampling_strategy": "random"},
            "model.mixer.sampling_strategy: .*'full_layout' or 'sandwich', got 'random'",
        ),
        (
            {"model__mixer__predefined_layout_probabilities": [0.5]},
            "one probability for each of the 0 predefined_layouts, got 1",
        ),
        (
            {
                "model__mixer__predefined_layouts": [["mamba", "gdn"]],
                "model__mixer__predefined_layout_probabilities": [0.5],
            },
            "predefined_layouts takes names of the mixers .* got 'gdn'",
        ),
        (
            {
                "model__mixer__predefined_layouts": [["mamba"], ["mamba", "mamba"]],
                "model__mixer__predefined_layout_probabilities": [0.5, 0.5],
            },
            r"predefined_layouts takes layouts of one length, got lengths \[1, 2\]",
        ),
        (
            {
                "model__mixer__predefined_layouts": [["mamba"] * 2] * 2,
                "model__mixer__predefined_layout_probabilities": [0.75, 0.5],
            },
            "predefined_layout_probabilities takes a sum of at most 1, got 1.25",
        ),
        (
            {
                "model__mixer__predefined_layouts": [["mamba"] * 2],
                "model__mixer__predefined_layout_probabilities": [1.5],
            },
            r"predefined_layout_probabilities.0: .* less than or equal to 1, got 1.5",
        ),
        (
            {"model__mixer__mixers": {"a.b": MIXERS["mamba"]}},
            "a mixer's name takes letters, digits, - and _, .* got 'a.b'",
        ),
        (
            {"model__mixer__mixers": {"keys": MIXERS["mamba"]}},
            "attribute of .* got 'keys'",
        ),
        ({"model__mixer__mixers": {"training": MIXERS["mamba"]}}, "attribute of .* got 'training'"),
        (
            {"model__placement": ["mamba"]},
            r"model: placement takes one mixer name for each of the 2 layers, got \['mamba'\]",
        ),
        ({"model__placement": ["mamba", "gdn"]}, "placement takes names of .* got 'gdn'"),
        (
            {"model__mixer__mixers": {"a": {"type": "attention", "heads": 4, "kv_heads": 3}}},
            r"mixers.a: kv_heads must divide heads \(4\), got 3",
        ),
        (
            {"model__mixer__mixers": {"a": {"type": "attention", "heads": 5}}},
            r"model: heads must divide hidden_size \(32\)",
        ),
        (
            {"model__mixer__mixers": {"m": {"type": "mamba", "d_inner": 32, "d_xb": 12}}},
            r"mixers.m: d_xb must be a multiple of state_size \(16\), got 12",
        ),
        (
            {"model__mixer__mixers": {"m": {"type": "mamba", "d_inner": 40, "d_xb": 16}}},
            r"mixers.m: d_inner must be a multiple of d_xb \(16\), got 40",
        ),
        (
            {"model__mixer__mixers": {"m": {"type": "gdn", "d_inner": 1}}},
            "^model.mixer.mixers.m.type: takes one of 'attention', 'mamba', 'mamba1', got 'gdn'$",
        ),
        ({"model__mixer__mixers": {"m": {"heads": 1}}}, "^model.mixer.mixers.m.type: is required$"),
        (
            {"model__mixer__mixers": {"attention": {"type": "attention"}}},
            "^model.mixer.mixers.attention.heads: is required$",
        ),
        (
            {"model__mixer": {"type": "attention", "heads": 4, "attention": 1}},
            "^model.mixer.attention: is not a known key$",
        ),
        (
            {"model__mixer__mixers": {"mamba": {"type": "mamba", "d_inner": 8, "dt_rank": "foo"}}},
            "^model.mixer.mixers.mamba.dt_rank: .* a valid integer or 'auto', got 'foo'$",
        ),
        (
            {"model__mixer__mixers": {"m": MIXERS["mamba"] | {"dt_min": 0.1, "dt_max": 0.1}}},
            r"mixers.m: dt_min must be below dt_max \(0.1\), got 0.1",
        ),
        (
            {"model__mixer__mixers": {"a": MIXERS["attention"] | {"head_dim": 3}}},
            "mixers.a: head_dim must be even where rope_theta is given, got 3",
        ),
        (
            {"model__hidden_size": 36, "model__mixer__mixers": {"a": MIXERS["attention"]}},
            "model: head_dim must be even where rope_theta is given, got 9",
        ),
        (
            {"model__norm_eps": float("inf")},
            "model.norm_eps: .* a finite number, got inf",
        ),
        (
            {"search": SEARCH | {"budgets": 3}},
            "^search.budgets: input should be a list or keys and values, got 3$",
        ),
        ({"data": 3}, "^data: input should be keys and values, got 3$"),
        ({"training": 3}, "^training: input should be keys and values, got 3$"),
        ({"training__betas": 3}, "^training.betas: input should be a list, got 3$"),
        (
            {"data": {"type": "text", "paths": "/x"}},
            "^data.paths: input should be a list, got '/x'$",
        ),
        ({"output": 3}, "^output: input should be a path, got 3$"),
        (
            {"search": SEARCH | {"budgets": [1.5]}},
            "^search.budgets.0: input should be a valid int.* 1.5",
        ),
        (
            {"search": SEARCH | {"budgets": {"mamba": "x"}}},
            "^search.budgets.mamba: input should be a valid integer, got 'x'$",
        ),
        (
            {"search": SEARCH | {"score_metric": "acuracy"}},
            "^search.score_metric: input should be 'loss' or 'accuracy', got 'acuracy'$",
        ),
        (
            {"search": SEARCH | {"training_config": "other.yaml"}},
            "^search.training_config goes in a file that holds a search alone; .* other.yaml$",
        ),
        ({"training__steps": 0}, "training.steps: .* greater than 0, got 0"),
        ({"training__stepz": 1}, "training.stepz: is not a known key$"),
        ({"data__type": "web"}, "^data.type: takes one of 'mqar', 'text', got 'web'$"),
        (
            {"data__vocab_size": 65},
            "^model.vocab_size must hold the data's 65 tokens, got 64",
        ),
        (
            {
                "model__mixer__predefined_layouts": [["mamba"]],
                "model__mixer__predefined_layout_probabilities": [0.5],
            },
            "model: predefined_layouts takes .* each of the 2 layers, got a layout of 1",
        ),
    ],
)
def test_invalid_values_get_one_sentence(tmp_path, changes, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        load_config(write(tmp_path, **changes), (), RunConfig)
    assert len(str(caught.value).splitlines()) == 1


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*absent.yaml: No such file"):
        load_config(tmp_path / "absent.yaml", (), RunConfig)
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match=r"bad.yaml is not YAML"):
        load_config(tmp_path / "bad.yaml", (), RunConfig)
    (tmp_path / "list.yaml").write_text("[]")
    with pytest.raises(ConfigError, match=r"list.yaml takes a mapping of keys to values"):
        load_config(tmp_path / "list.yaml", (), RunConfig)
    (tmp_path / "latin.yaml").write_bytes("output: Zürich".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin.yaml is not UTF-8 at byte 9"):
        load_config(tmp_path / "latin.yaml", (), RunConfig)
    for value in ("[1,", "2024-13-45"):
        with pytest.raises(ConfigError, match=r"^seed=.* is not YAML: .*$"):
            load_config(write(tmp_path), (f"seed={value}",), RunConfig)
    with pytest.raises(ConfigError, match="form key=value, got 'steps'"):
        load_config(write(tmp_path), ("steps",), RunConfig)
    with pytest.raises(ConfigError, match=r"seed\.x goes inside seed, which is 1"):
        load_config(write(tmp_path, seed=1), ("seed.x=1",), RunConfig)
