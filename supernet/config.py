"""Configuration: what a supernet is made of, how its tables are drawn, how it is trained.

Every model here is frozen, refuses keys that it does not know, and takes finite numbers alone. The
loader reads them from YAML files.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StrictInt,
    field_validator,
    model_validator,
)
from torch.nn import ModuleDict

from ..autotune.schema import Strict
from ..kernels.routing import Strategy
from .data import DataConfig
from .errors import ConfigError
from .search.config import SearchConfig, check_samples
from .widths import TAPS, check_groups, check_heads, check_rotation, head_dim_of

# Fast-LLM's default: what sets the mixers' random numbers apart from all others of a seed.
SEED_SHIFT = 501974169931277706872159392843


def names_or_path(placement: Any) -> Any:
    """Before the members of the union are tried, whose own words say less."""
    names = isinstance(placement, list | tuple) and all(isinstance(x, str) for x in placement)
    if placement is None or names or isinstance(placement, str | Path):
        return placement
    raise ValueError(
        "takes a list of mixer names, one name for all layers, or the path of a search result, "
        f"got {placement!r}"
    )


# A path that is a mixer's name means that mixer in every layer: `placement_of` knows the mixers.
NamesOrResult = Annotated[tuple[str, ...] | Path | None, BeforeValidator(names_or_path)]


Taps = Annotated[int, Field(ge=TAPS[0], le=TAPS[1])]


class AttentionConfig(Strict):
    """Causal softmax attention with grouped key and value heads and rotary positions."""

    type: Literal["attention"]
    heads: PositiveInt = Field(description="of the queries")
    kv_heads: PositiveInt | None = Field(None, description="defaults to heads")
    head_dim: PositiveInt | None = Field(None, description="defaults to hidden_size / heads")
    window_size: PositiveInt | None = Field(
        None, description="tokens a query sees, itself included; none means all before it"
    )
    rope_theta: PositiveFloat | None = Field(10000.0, description="none means no positions")

    @model_validator(mode="after")
    def groups_divide(self) -> "AttentionConfig":
        check_heads(self.heads, self.kv_heads or self.heads)
        if self.head_dim:
            check_rotation(self.head_dim, self.rope_theta)
        return self


class MambaConfig(Strict):
    """Mamba in Apriel's grouped form, fit to take over the heads of grouped-query attention.

    x and B have d_xb channels, z and C have d_inner; x and B are repeated to d_inner as grouped
    key and value heads are (Wang et al. 2024, "The Mamba in the Llama", section 2).
    """

    type: Literal["mamba"]
    d_inner: PositiveInt = Field(description="channels of the scan")
    d_xb: PositiveInt | None = Field(None, description="defaults to d_inner")
    state_size: PositiveInt = Field(16, description="states of a channel")
    dt_rank: PositiveInt | Literal["auto"] = Field("auto", description="auto: hidden_size / 16, up")
    d_conv: Taps = Field(4, description="taps of the convolution")
    repeat_kv_before_conv: bool = Field(
        True, description="repeat x to d_inner before the convolution, not after it"
    )
    conv_bias: bool = Field(True, description="of the convolution")
    dt_proj_bias: bool = Field(True, description="of the projection to step sizes")
    bias: bool = Field(False, description="of the projections in and out")
    dt_min: PositiveFloat = Field(0.001, description="the least initial step size")
    dt_max: PositiveFloat = Field(0.1, description="the largest initial step size")
    dt_scale: PositiveFloat = Field(1.0, description="a factor on dt_proj's initial weights")
    dt_init_floor: PositiveFloat = Field(1e-4, description="what no initial step size is below")
    dt_init: Literal["random", "constant"] = Field("random", description="of dt_proj's weights")

    @model_validator(mode="after")
    def groups_divide(self) -> "MambaConfig":
        check_groups(self.d_inner, self.d_xb or self.d_inner, self.state_size)
        return self

    @model_validator(mode="after")
    def steps_are_ordered(self) -> "MambaConfig":
        if self.dt_min >= self.dt_max:
            raise ValueError(f"dt_min must be below dt_max ({self.dt_max}), got {self.dt_min}")
        return self


class Mamba1Config(Strict):
    """Mamba as in mamba_ssm.Mamba, with its defaults."""

    type: Literal["mamba1"]
    d_state: PositiveInt = Field(16, description="states of a channel")
    d_conv: Taps = Field(4, description="taps of the convolution")
    expand: PositiveInt = Field(2, description="channels of the scan, by hidden_size")
    dt_rank: PositiveInt | Literal["auto"] = Field("auto", description="auto: hidden_size / 16, up")
    conv_bias: bool = Field(True, description="of the convolution")
    bias: bool = Field(False, description="of the projections in and out")


PlainMixerConfig = Annotated[
    AttentionConfig | MambaConfig | Mamba1Config, Field(discriminator="type")
]


class StochasticMixerConfig(Strict):
    """Several mixers in one layer; each step draws which one runs.

    The fields and their meaning are those of Fast-LLM's StochasticMixerConfig; `sandwich`,
    `per_sample` and `cheapest_mixer_name` are ours.
    """

    type: Literal["stochastic"] = "stochastic"
    mixers: dict[str, PlainMixerConfig]
    sampling_strategy: Literal["uniform", "weighted", "full_layout", "sandwich"] = "uniform"
    sampling_weights: dict[str, NonNegativeFloat] | None = Field(
        None, description="for weighted: a weight for each mixer, normalised to one"
    )
    main_mixer_name: str | None = Field(None, description="defaults to the first mixer")
    predefined_layouts: tuple[tuple[str, ...], ...] = Field(
        (), description="placements that are drawn whole, a mixer name for each layer"
    )
    predefined_layout_probabilities: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(
        (), description="of each of them, 1 at most together"
    )
    seed_shift: int = Field(SEED_SHIFT, description="added to the run's seed, for the draws alone")
    per_sample: bool = Field(False, description="each sample of a batch draws its own mixers")
    cheapest_mixer_name: str | None = Field(None, description="for sandwich, and required there")

    @field_validator("mixers")
    @classmethod
    def mixers_are_named(cls, mixers: dict[str, Any]) -> dict[str, Any]:
        if not mixers:
            raise ValueError("a stochastic mixer takes at least one mixer")
        for name in mixers:
            check_mixer_name(name)
        return mixers

    @model_validator(mode="after")
    def names_are_known(self) -> "StochasticMixerConfig":
        names = list(self.mixers)
        for key in ("main_mixer_name", "cheapest_mixer_name"):
            name = getattr(self, key)
            if name is not None and name not in self.mixers:
                raise ValueError(f"{key} takes one of the mixers {names}, got {name!r}")
        if (self.cheapest_mixer_name is None) is (self.sampling_strategy == "sandwich"):
            raise ValueError(
                "cheapest_mixer_name goes with sampling_strategy sandwich and with no other, "
                f"got {self.cheapest_mixer_name!r} with {self.sampling_strategy}"
            )
        for layout in self.predefined_layouts:
            unknown = sorted(set(layout) - set(names))
            if unknown:
                raise ValueError(
                    f"predefined_layouts takes names of the mixers {names}, got {unknown[0]!r}"
                )
        return self

    @model_validator(mode="after")
    def weights_fit(self) -> "StochasticMixerConfig":
        weights, strategy = self.sampling_weights, self.sampling_strategy
        if (weights is None) is (strategy == "weighted"):
            raise ValueError(
                "sampling_weights goes with sampling_strategy weighted and with no other, "
                f"got sampling_weights {weights} with {strategy}"
            )
        if weights is None:
            return self
        if set(weights) != set(self.mixers):
            raise ValueError(
                f"sampling_weights takes a weight for each of the mixers {list(self.mixers)}, "
                f"got {list(weights)}"
            )
        if not (0 < sum(weights.values()) < math.inf):
            raise ValueError(
                f"sampling_weights takes finite weights with a positive sum, got {weights}"
            )
        return self

    @model_validator(mode="after")
    def layouts_fit(self) -> "StochasticMixerConfig":
        layouts, probabilities = self.predefined_layouts, self.predefined_layout_probabilities
        if len(layouts) != len(probabilities):
            raise ValueError(
                "predefined_layout_probabilities takes one probability for each of the "
                f"{len(layouts)} predefined_layouts, got {len(probabilities)}"
            )
        if len({len(layout) for layout in layouts}) > 1:
            raise ValueError(
                "predefined_layouts takes layouts of one length, "
                f"got lengths {[len(layout) for layout in layouts]}"
            )
        if math.fsum(probabilities) > 1:
            raise ValueError(
                "predefined_layout_probabilities takes a sum of at most 1, "
                f"got {math.fsum(probabilities)}"
            )
        return self

    @property
    def main(self) -> str:
        return self.main_mixer_name or next(iter(self.mixers))

    def strategy(self, layers: int) -> Strategy:
        """How the tables of a model of `layers` layers are drawn, as the kernels take it.

        Raises ConfigError where a predefined layout has another length than the model.
        """
        names = list(self.mixers)
        for layout in self.predefined_layouts:
            if len(layout) != layers:
                raise ConfigError(
                    f"predefined_layouts takes one mixer for each of the {layers} layers, "
                    f"got a layout of {len(layout)}"
                )
        weights = self.sampling_weights
        return Strategy(
            mixers=len(names),
            kind=self.sampling_strategy,
            weights=tuple(weights[name] for name in names) if weights else None,
            layouts=tuple(
                tuple(names.index(name) for name in layout) for layout in self.predefined_layouts
            ),
            layout_probabilities=self.predefined_layout_probabilities,
            main=names.index(self.main),
            cheapest=names.index(self.cheapest_mixer_name or self.main),
            per_sample=self.per_sample,
        )


MixerConfig = Annotated[
    StochasticMixerConfig | AttentionConfig | MambaConfig | Mamba1Config,
    Field(discriminator="type"),
]


# Of a ModelConfig: what no weight depends on
TOKENS = "bos_token_id", "eos_token_id", "pad_token_id"
OF_TEXT = *TOKENS, "max_position_embeddings"

Token = Annotated[StrictInt, Field(ge=0)]


class ModelConfig(Strict):
    """A decoder: embedding, blocks of mixer and SwiGLU, norm, head."""

    vocab_size: PositiveInt = Field(description="tokens")
    hidden_size: PositiveInt = Field(description="channels of the residual stream")
    num_layers: PositiveInt = Field(description="blocks")
    intermediate_size: PositiveInt = Field(description="channels inside the MLP")
    mixer: MixerConfig
    placement: tuple[str, ...] | None = Field(
        None, description="one of the stochastic mixer's names per layer: an ordinary model"
    )
    norm_eps: PositiveFloat = Field(1e-5, description="of the norms")
    tie_embeddings: bool = Field(False, description="the head is the embedding")
    initializer_range: PositiveFloat = Field(
        0.02, description="standard deviation of initial weights"
    )
    bos_token_id: Token | None = Field(None, description="begins a text; for other software")
    eos_token_id: Token | tuple[Token, ...] | None = Field(
        None, description="ends what is generated"
    )
    pad_token_id: Token | None = Field(None, description="fills a row after its end")
    max_position_embeddings: PositiveInt | None = Field(
        None, description="tokens that other software may take"
    )

    def told_by(self, other: "ModelConfig") -> "ModelConfig":
        """This, with what another one says of text where this one says nothing."""
        said = {key: getattr(other, key) for key in OF_TEXT if getattr(self, key) is None}
        return self.model_copy(update=said)

    @model_validator(mode="after")
    def tokens_are_known(self) -> "ModelConfig":
        for key in TOKENS:
            value = getattr(self, key)
            tokens = value if isinstance(value, tuple) else () if value is None else (value,)
            for token in tokens:
                if token >= self.vocab_size:
                    raise ValueError(
                        f"{key} takes tokens below vocab_size = {self.vocab_size}, got {token}"
                    )
        return self

    @model_validator(mode="after")
    def parts_fit(self) -> "ModelConfig":
        if self.placement is not None:
            if not isinstance(self.mixer, StochasticMixerConfig):
                raise ValueError("placement goes with a mixer of type stochastic")
            check_placement(self.placement, list(self.mixer.mixers), self.num_layers)
        if isinstance(self.mixer, StochasticMixerConfig):
            self.mixer.strategy(self.num_layers)  # refuses layouts of another length
        for mixer in self.mixers.values():
            if isinstance(mixer, AttentionConfig) and not mixer.head_dim:
                check_rotation(head_dim_of(self.hidden_size, mixer.heads), mixer.rope_theta)
        return self

    @property
    def mixers(self) -> dict[str, Any]:
        """A layer's choices by name; a plain mixer is called by its type."""
        if isinstance(self.mixer, StochasticMixerConfig):
            return self.mixer.mixers
        return {self.mixer.type: self.mixer}

    @property
    def is_supernet(self) -> bool:
        return isinstance(self.mixer, StochasticMixerConfig) and self.placement is None


Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainingConfig(Strict):
    """How a supernet is trained. Rates are per optimizer step, sizes in samples."""

    steps: PositiveInt = Field(description="of the optimizer")
    batch_size: PositiveInt = Field(description="samples in a micro-batch, on each rank")
    accumulation: PositiveInt = Field(1, description="micro-batches in a step")
    table_per: Literal["micro_batch", "step"] = Field(
        "micro_batch", description="what draws a mixer table of its own"
    )
    table_per_rank: bool = Field(
        False, description="under torchrun, draw another table on each rank instead of one for all"
    )
    learning_rate: PositiveFloat = Field(1e-3, description="the peak")
    final_learning_rate: NonNegativeFloat = Field(0.0, description="after the cosine")
    warmup_steps: NonNegativeInt = Field(
        0, description="in which the rate rises to its peak; a shorter run ends on the way up"
    )
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="AdamW's")
    eps: PositiveFloat = Field(1e-8, description="AdamW's")
    weight_decay: NonNegativeFloat = Field(0.1, description="AdamW's, of matrices")
    clip_norm: PositiveFloat | None = Field(
        1.0, description="the largest norm of a step's gradients; null: any"
    )
    inactive: Literal["skip", "decay"] = Field(
        "skip",
        description="a mixer that no sample took is left alone, or its momentum and decay go on",
    )
    init_from: Path | None = Field(
        None, description="a pretrained ordinary checkpoint, whose mixers the main mixers start as"
    )
    frozen: tuple[str, ...] = Field((), description="patterns of parameter names, as in a shell")
    dispatch: Literal["device", "host", "dense"] = Field(
        "host", description="who follows the mixer table; device: the kernels themselves"
    )
    graph: bool = Field(
        False, description="capture a step in one CUDA graph and replay it; with dispatch device"
    )
    streams: bool = Field(
        False,
        description="launch each of a layer's mixers on a CUDA stream of its own, so that those of "
        "different samples overlap; with dispatch device",
    )
    device: str = Field("cpu", description="cpu or cuda")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="bfloat16: training's matrix products under autocast, weights in float32; "
        "evaluation and search compute in the weights' dtype",
    )
    log_every: PositiveInt = Field(10, description="steps")
    evaluate_every: PositiveInt | None = Field(
        None, description="steps, and after the last; null: never"
    )
    evaluation_batches: PositiveInt = Field(8, description="of batch_size samples each")
    checkpoint_every: PositiveInt = Field(500, description="steps")
    keep_checkpoints: PositiveInt = Field(2, description="the newest ones")

    @model_validator(mode="after")
    def the_device_dispatches_where_it_must(self) -> "TrainingConfig":
        for key in ("graph", "streams"):
            if getattr(self, key) and self.dispatch != "device":
                raise ValueError(f"{key} takes dispatch device, got {self.dispatch}")
        return self


class RunConfig(Strict):
    """One file for training, search and evaluation."""

    output: Path = Field(description="the run's folder")
    seed: NonNegativeInt = Field(0, description="of weights, data and draws")
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    search: SearchConfig | None = None

    @model_validator(mode="after")
    def tokens_fit(self) -> "RunConfig":
        if self.model.vocab_size < self.data.vocab_size:
            raise ValueError(
                f"model.vocab_size must hold the data's {self.data.vocab_size} tokens, "
                f"got {self.model.vocab_size}"
            )
        return self

    @model_validator(mode="after")
    def search_is_of_this_run(self) -> "RunConfig":
        if self.search is not None and self.search.training_config is not None:
            raise ValueError(
                "search.training_config goes in a file that holds a search alone; "
                f"this file's search is of its own run, got {self.search.training_config}"
            )
        return self


class EvaluationConfig(RunConfig):
    """A run, and which checkpoint of it, or of anything else, to measure on its held-out data."""

    checkpoint: Path | None = Field(
        None, description="of any format, or a run; none is this run's newest"
    )
    placement: NamesOrResult = Field(
        None,
        description="a mixer name per layer, one for all layers, or a search result; none is the "
        "main mixers",
    )

    @model_validator(mode="after")
    def errors_are_defined(self) -> "EvaluationConfig":
        check_samples(self.training.evaluation_batches, self.training.batch_size)
        return self


class LatencyConfig(RunConfig):
    """A run, and what its mixers are timed on, or a roofline is drawn for."""

    batch: PositiveInt | None = Field(None, description="defaults to training.batch_size")
    seqlen: PositiveInt | None = Field(None, description="defaults to data.length")
    dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="of weights and activations; defaults to training.dtype"
    )
    direction: Literal["forward", "forward+backward", "decode"] = Field(
        "forward", description="decode is one token of each sample, behind seqlen - 1 others"
    )
    gpu: str | None = Field(
        None, description="whose roofline to draw; none measures on training.device"
    )
    measured: tuple[Path, ...] = Field(
        (), description="tables measured on that GPU, which calibrate the roofline"
    )
    table: Path | None = Field(
        None,
        description="the file; defaults to latency.json, or roofline.json, in output, "
        "with -decode or -forward+backward before the dot",
    )

    @model_validator(mode="after")
    def a_roofline_is_calibrated(self) -> "LatencyConfig":
        if self.measured and self.gpu is None:
            raise ValueError("measured takes a roofline: name its gpu")
        return self

    @model_validator(mode="after")
    def a_token_is_decoded_behind_others(self) -> "LatencyConfig":
        if self.direction == "decode" and (self.seqlen or self.data.length) < 2:
            raise ValueError("direction decode takes a seqlen of 2 or more")
        return self


def check_mixer_name(name: str) -> None:
    """Names become keys of a module dict and parts of tensor names."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", name) or hasattr(ModuleDict(), name):
        raise ValueError(
            "a mixer's name takes letters, digits, - and _, begins with no digit, and is no "
            f"attribute of torch.nn.ModuleDict, got {name!r}"
        )


def check_placement(placement: Sequence[str], mixers: Sequence[str], layers: int) -> None:
    """Raises ConfigError unless there is one known mixer for each layer."""
    if isinstance(placement, str) or len(placement) != layers:
        raise ConfigError(
            f"placement takes one mixer name for each of the {layers} layers, "
            f"got {placement if isinstance(placement, str) else list(placement)}"
        )
    for name in placement:
        if name not in mixers:
            raise ConfigError(f"placement takes names of the mixers {list(mixers)}, got {name!r}")
