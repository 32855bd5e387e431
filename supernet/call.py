"""One forward of a layer: which of its keyword arguments a mixer gets, and what it reports."""

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .device_dispatch import RoutedMixer
from .metrics import Mean, accumulate
from .mixers.packing import PACKING_KWARGS, Packing

if TYPE_CHECKING:
    from .stochastic import StochasticMixer

# Of forward functions, as finding out takes the host 20 µs
SIGNATURES: WeakKeyDictionary[Callable[..., Any], inspect.Signature] = WeakKeyDictionary()


class Call:
    """One forward of a StochasticMixer: runs a mixer by name, on all samples or on some."""

    def __init__(
        self,
        layer: "StochasticMixer",
        hidden_states: Tensor,
        kwargs: Mapping[str, Any],
        preprocessed: Mapping[str, Mapping[str, Any]],
        losses: dict[str, Mean] | None,
        metrics: dict[str, Mean] | None,
    ):
        self.layer, self.hidden_states, self.kwargs = layer, hidden_states, kwargs
        self.preprocessed, self.reports = preprocessed, {"losses": losses, "metrics": metrics}

    def preprocessed_of(self, name: str) -> dict[str, Any]:
        """What was computed ahead for the named mixer, or is now if nothing was."""
        given = self.preprocessed.get(name, {})
        preprocess = getattr(self.layer.mixers[name], "preprocess", None)
        if preprocess is None or any(key not in PACKING_KWARGS for key in given):
            return dict(given)
        x = self.hidden_states
        return {**preprocess(torch.arange(x.shape[1], device=x.device)), **given}

    def run(self, name: str, rows: Tensor | None = None, taken: Tensor | None = None) -> Tensor:
        """The named mixer's output for `rows` (None: all).

        taken: (batch,) bool, the samples whose losses and metrics count (None: all that ran).
        """
        mixer = self.layer.mixers[name]
        reports: dict[str, dict[str, Any]] = {"losses": {}, "metrics": {}}
        kwargs = {**self.kwargs, **self.preprocessed.get(name, {})}
        if isinstance(mixer, RoutedMixer) and self.hidden_states.shape[0] != 1:
            kwargs.pop("position_ids", None)  # they tell of packed sequences in one row alone
        kwargs = {key: self._rows_of(key, value, rows) for key, value in kwargs.items()}
        hidden_states = self.hidden_states if rows is None else self.hidden_states[rows]
        out = mixer(hidden_states, **accepted_kwargs(mixer, {**kwargs, **reports}))
        for kind, values in reports.items():
            self._report(kind, name, values, hidden_states.shape[0], taken)
        return out[0] if isinstance(out, tuple) else out

    def _rows_of(self, key: str, value: Any, rows: Tensor | None) -> Any:
        if rows is None or value is None:
            return value
        if isinstance(value, Packing):
            return value.rows(rows)
        if key == "past_key_values":
            raise ValueError("a cache cannot be shared among mixers: pass past_key_values=None")
        if key not in self.layer.batched_kwargs:
            return value
        if isinstance(value, tuple):
            return tuple(self._rows_of(key, item, rows) for item in value)
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{key} takes a tensor with a row for each sample, got {type(value).__name__}"
            )
        batch = self.hidden_states.shape[0]
        if len(value) not in (1, batch):
            raise ValueError(
                f"{key} takes one row, or one for each of the {batch} samples, got {len(value)}"
            )
        return value if len(value) == 1 else value[rows]

    def _report(
        self, kind: str, name: str, values: dict[str, Any], samples: int, taken: Tensor | None
    ) -> None:
        """Add what a mixer reported to what the caller collects, if anything."""
        into = self.reports[kind]
        for key, value in values.items():
            if isinstance(value, Mean) and taken is None:  # of a StochasticMixer inside this one
                mean = value
            elif isinstance(value, Tensor) and value.shape == (samples,):
                mean = Mean.of(value, taken)
            else:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"{kind} of mixer {name} take one value per sample, shape ({samples},), "
                    f"got {got} for {key}"
                )
            if into is not None:
                accumulate(into, f"{name}/{key}", mean)


def accepted_kwargs(mixer: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of the keyword arguments that a mixer's forward takes.

    One that takes them all, by **kwargs, gets those that it names and those that say something: it
    may hand them to code that knows neither `losses` nor an absent cache.
    """
    named, takes_all = named_kwargs(mixer), takes_all_kwargs(mixer)
    silent = {"losses", "metrics"}
    return {
        key: value
        for key, value in kwargs.items()
        if key in named
        or (takes_all and key not in silent and value is not None and value is not False)
    }


def named_kwargs(mixer: nn.Module) -> set[str]:
    """The arguments that a mixer's forward names."""
    parameters = signature_of(mixer).parameters.values()
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def takes_all_kwargs(mixer: nn.Module) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in signature_of(mixer).parameters.values())


def signature_of(mixer: nn.Module) -> inspect.Signature:
    forward = getattr(mixer, "_orig_mod", mixer).forward  # behind torch.compile's
    if torch.compiler.is_compiling():  # which knows no weak references
        return inspect.signature(forward)
    function = getattr(forward, "__func__", forward)
    if function not in SIGNATURES:
        SIGNATURES[function] = inspect.signature(forward)
    return SIGNATURES[function]
