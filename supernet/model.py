"""The decoder: embedding, blocks of mixer and SwiGLU (Shazeer 2020), RMS norms, head.

Tensors are named as in transformers' Mistral, with the mixers of a stochastic layer side by side
under `layers.i.mixer.mixers.<name>`, and a plain mixer, or a placement's, under `layers.i.mixer`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.routing import MixerTable, Strategy, draw
from .config import ModelConfig, StochasticMixerConfig, check_placement
from .data import IGNORED
from .generation import Sampler, generate, greedy
from .metrics import Mean
from .mixers import Cache, build_mixer
from .mixers.packing import packing_of
from .stochastic import Dispatch, StochasticMixer


class SwiGLU(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, dispatch: Dispatch):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.mixer = layer_mixer(config, layer, dispatch)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        x = x + self.mixer(self.input_layernorm(x), **kwargs)
        return x + self.mlp(self.post_attention_layernorm(x))


class SupernetModel(nn.Module):
    """A decoder language model whose layers hold one mixer or several.

    config: its shape. dispatch: who follows the mixer table, device, host or dense.
    Training a model with stochastic mixers takes `table=` (from `draw`) or `placement=`; evaluation
    takes the main mixer in every layer unless one of them is given.
    """

    def __init__(self, config: ModelConfig, dispatch: Dispatch = "host"):
        super().__init__()
        if not isinstance(config, ModelConfig):
            raise ValueError(
                f"config takes a ModelConfig, got {type(config).__name__}: "
                "tossup.ModelConfig(**values) makes one of a mapping"
            )
        self.config, self.dispatch = config, dispatch
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, layer, dispatch) for layer in range(config.num_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._initialize()
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self,
        tokens: Tensor,
        *,
        table: MixerTable | None = None,
        placement: str | Sequence[str] | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        seq_idx: Tensor | None = None,
        losses: dict[str, Mean] | None = None,
        metrics: dict[str, Mean] | None = None,
        cache: Cache | None = None,
        logits_to_keep: int = 0,
    ) -> Tensor:
        """Logits (batch, seqlen, vocab_size) of tokens (batch, seqlen).

        table: follow this mixer table. placement: one mixer name per layer, or for all, over the
        table. Training takes one of the two, evaluation the main mixers by default.
        attention_mask: (batch, seqlen) padding mask. seq_idx: integers (batch, seqlen), the number
        of each token's sequence, where rows pack several. cu_seqlens: (sequences + 1,) int32, the
        same for a batch of one row. losses, metrics: dicts for the mixers' own.
        cache: keys, values and states of earlier tokens, and their padding; it is read, and then
        extended by these. The same mixers take it from the first token to the last. logits_to_keep:
        how many last tokens get logits; 0 is all.
        """
        places = self._places(placement)
        if self.training and table is placement is None and not self._is_routed():
            raise ValueError(
                "training follows a mixer table: pass table=, as draw(seed, step, batch) gives "
                "one, or placement="
            )
        kwargs: dict[str, Any] = {
            "attention_mask": attention_mask, "cu_seqlens": cu_seqlens, "seq_idx": seq_idx
        }  # fmt: skip
        if cache is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
            waits = table is None or self.dispatch != "device"
            kwargs = {"packing": packing_of(tokens, left=-1, waits=waits, **kwargs)}
        else:
            positions = cache.extend(tokens.shape[1], tokens.device).positions
        preprocessed = self._preprocess(positions)
        x = self.embed_tokens(tokens)
        for layer, block in enumerate(self.layers):
            if cache is not None:
                kwargs["past_key_values"] = cache.layers[layer]
            if self.config.is_supernet:
                kwargs.update(table=table, placement=places[layer], preprocessed=preprocessed)
                kwargs.update(losses=losses, metrics=metrics)
                x = block(x, **kwargs)
            else:
                x = block(x, **kwargs, **preprocessed.get(places[layer], {}))
        return self.lm_head(self.norm(x[:, -logits_to_keep:]))

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = 50,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
        placement: str | Sequence[str] | None = None,
    ) -> Tensor:
        """Continue prompts token by token; names and defaults are those of transformers.

        input_ids: (batch, seqlen). attention_mask: (batch, seqlen), zero in the padding, which
        stands on the left of shorter prompts; a row's result does not depend on it.
        max_new_tokens: how many to add, unless every row has come to an eos_token_id, one or
        several, before; by default the configuration's, [] is none. pad_token_id: what fills a row
        after its eos; by default the configuration's, or else the (first) eos.
        do_sample: draw each token, with `generator` or torch's own; otherwise take the likeliest.
        temperature divides the logits, top_k keeps so many of the likeliest tokens (None or 0:
        all), top_p the fewest whose probabilities reach it. placement: as in `forward`; the main
        mixers by default, in training as in evaluation.

        Returns (batch, seqlen + new tokens). On an accelerator the host runs ahead: it waits for
        the device every 16 tokens if there is an eos, and at the end.
        Raises ValueError where an argument is not as above.
        """
        if input_ids.ndim != 2 or 0 in input_ids.shape or input_ids.is_floating_point():
            raise ValueError(
                "input_ids must be integers (batch, seqlen), with at least one token, "
                f"got {tuple(input_ids.shape)} of {input_ids.dtype}"
            )
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must be like input_ids, {tuple(input_ids.shape)}, "
                f"got {tuple(attention_mask.shape)}"
            )
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens takes at least 1, got {max_new_tokens}")
        choose = Sampler(temperature, top_k, top_p, generator) if do_sample else greedy
        ends = self.config.eos_token_id if eos_token_id is None else eos_token_id
        stops = [ends] if isinstance(ends, int) else list(ends or ())
        pads = (pad_token_id, self.config.pad_token_id, *stops, 0)
        pad = next(token for token in pads if token is not None)
        if placement is None and self.config.is_supernet:
            assert isinstance(self.config.mixer, StochasticMixerConfig)
            placement = (self.config.mixer.main,) * self.config.num_layers
        room = input_ids.shape[1] + max_new_tokens - 1  # the last token is not read again
        cache = Cache(self.config.num_layers, room, attention_mask)

        def step(tokens: Tensor) -> Tensor:
            return self(tokens, placement=placement, cache=cache, logits_to_keep=1)[:, -1]

        look_every = 1 if input_ids.device.type == "cpu" else 16
        return generate(step, choose, input_ids, max_new_tokens, stops, pad, look_every)

    @property
    def mixer_names(self) -> tuple[str, ...]:
        return tuple(self.config.mixers)

    def strategy(self) -> Strategy:
        """How this model's tables are drawn. Raises ValueError unless it is a supernet."""
        if not self.config.is_supernet:
            raise ValueError("only a model with stochastic mixers draws tables")
        assert isinstance(self.config.mixer, StochasticMixerConfig)
        return self.config.mixer.strategy(self.config.num_layers)

    def draw(self, seed: int, step: int | Tensor, batch: int) -> MixerTable:
        """The mixer table of a step: the same on every rank that names the same seed and step.

        It is drawn where it is followed: on the model's device, or the host. Raises ValueError
        unless the model is a supernet.
        """
        strategy = self.strategy()
        assert isinstance(self.config.mixer, StochasticMixerConfig)
        shifted = seed + self.config.mixer.seed_shift
        device = self.embed_tokens.weight.device if self.dispatch == "device" else "cpu"
        return draw(strategy, shifted, step, self.config.num_layers, batch, device=device)

    def gate_of(self, parameter: str) -> tuple[int, str] | None:
        """The (layer, mixer) that owns the named parameter; None where all placements share it."""
        parts = parameter.split(".")
        if parts[0] == "layers" and parts[2:4] == ["mixer", "mixers"]:
            return int(parts[1]), parts[4]
        return None

    def flops_per_token(self, seqlen: int, placement: Sequence[str] | None = None) -> float:
        """Forward FLOPs per token at a sequence length, two per multiply-add, the same in any order
        of the layers.

        Of a placement; or else the exact expectation over the tables that the strategy draws.
        """
        shared = sum(
            parameter.numel()
            for name, parameter in self.named_parameters()
            if ".mixer." not in name and "norm" not in name
        )
        # The embedding is looked up, not multiplied; a tied one is counted once, as the head.
        shared -= 0 if self.config.tie_embeddings else self.embed_tokens.weight.numel()
        if placement is None and self.config.is_supernet:
            marginals = self.strategy().marginals(self.config.num_layers)
            mixing = [
                float(share) * mixer.flops_per_token(seqlen)
                for layer, shares in enumerate(marginals)
                for share, mixer in zip(shares, self._choices(layer).values(), strict=True)
            ]
        else:
            mixing = [
                self._choices(layer)[name].flops_per_token(seqlen)
                for layer, name in enumerate(self._places(placement))
            ]
        return math.fsum([2.0 * shared, *mixing])

    def _is_routed(self) -> bool:
        """Whether layers know their mixer by themselves: there is one, or a router tells it."""
        mixers = [block.mixer for block in self.layers]
        return not any(isinstance(m, StochasticMixer) and m.router is None for m in mixers)

    def _choices(self, layer: int) -> dict[str, Any]:
        mixer = self.layers[layer].mixer
        if isinstance(mixer, StochasticMixer):
            return dict(mixer.mixers.items())
        return {self._places(None)[layer]: mixer}

    def _places(self, placement: str | Sequence[str] | None) -> Sequence[Any]:
        """Each layer's mixer by name; None where the table or the main mixer says."""
        layers = self.config.num_layers
        if isinstance(placement, str):
            placement = (placement,) * layers
        if not self.config.is_supernet:
            own = self.config.placement or (self.mixer_names[0],) * layers
            if placement is not None and tuple(placement) != own:
                raise ValueError(
                    f"this model has the one placement {list(own)}, got {list(placement)}"
                )
            return own
        if placement is None:
            return (None,) * layers
        check_placement(placement, self.mixer_names, layers)
        return placement

    def _preprocess(self, positions: Tensor) -> dict[str, Mapping[str, Any]]:
        """What each kind of mixer computes once for all layers, in its own namespace."""
        representatives: dict[str, Any] = {}
        for layer in range(self.config.num_layers):
            representatives |= self._choices(layer)
        return {
            name: mixer.preprocess(positions)
            for name, mixer in representatives.items()
            if hasattr(mixer, "preprocess")
        }

    @torch.no_grad()
    def _initialize(self) -> None:
        """Normal weights; the mixers' own special tensors stay as they made them."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2 and not name.endswith(("dt_proj.weight", "A_log")):
                nn.init.normal_(parameter, std=self.config.initializer_range)
        depth = (2 * self.config.num_layers) ** -0.5  # of the residual stream (Radford et al. 2019)
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
                parameter.mul_(depth)


def layer_mixer(config: ModelConfig, layer: int, dispatch: Dispatch) -> nn.Module:
    """A layer's mixer: the one there is, the placement's, or all of them and a table's choice."""
    if config.is_supernet:
        assert isinstance(config.mixer, StochasticMixerConfig)
        mixers = {
            name: build_mixer(mixer, config.hidden_size) for name, mixer in config.mixers.items()
        }
        return StochasticMixer(
            mixers, layer=layer, main_mixer_name=config.mixer.main, dispatch=dispatch
        )
    name = config.placement[layer] if config.placement else next(iter(config.mixers))
    return build_mixer(config.mixers[name], config.hidden_size)


def language_model_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy summed over each sample's labelled tokens, and their number: (batch,) each.

    logits: (batch, seqlen, vocab). labels: (batch, seqlen), aligned with them; IGNORED (-100) does
    not count.
    """
    losses = F.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view_as(labels).sum(1), (labels != IGNORED).sum(1)
