"""How tables are drawn, as plain data. Mixers are numbers here; the second floor names them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import Literal, get_args

import numpy as np

Kind = Literal["uniform", "weighted", "full_layout", "sandwich"]

LAYOUT_LAYER = 2**31  # counters of layers end below; this one's word picks the predefined layout


@dataclass(frozen=True)
class Strategy:
    """How a mixer table is drawn. Two strategies of equal fields draw equal tables.

    mixers: how many mixers a layer chooses from, at least 1.
    kind: where no predefined layout is drawn,
        uniform: every layer picks any mixer;
        weighted: every layer picks a mixer by `weights`;
        full_layout: every allocation of layers to mixers is equally likely, then every arrangement
            of it, so that extremes are as frequent as even mixtures;
        sandwich: step after step all layers take `main`, then all take `cheapest`, then each picks
            any mixer, and again (the sandwich rule: Yu and Huang 2019, "Universally Slimmable
            Networks", section 3.2). Neighbouring samples are at neighbouring points of this cycle.
    weights: one number ≥ 0 per mixer, for kind="weighted" only. Kept normalised to a sum of 1.
    layouts: predefined layouts, each with one mixer per layer of the whole model.
    layout_probabilities: each layout's probability. What is left to 1 falls through to `kind`.
    main, cheapest: the mixers of the sandwich.
    per_sample: draw for every sample of a batch, rather than once for all of them.
    Raises ValueError where a field is out of range or fields disagree.
    """

    mixers: int
    kind: Kind = "uniform"
    weights: tuple[float, ...] | None = None
    layouts: tuple[tuple[int, ...], ...] = ()
    layout_probabilities: tuple[float, ...] = ()
    main: int = 0
    cheapest: int = 0
    per_sample: bool = False

    def __post_init__(self) -> None:
        if self.mixers < 1:
            raise ValueError(f"mixers must be at least 1, got {self.mixers}")
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        for name in ("main", "cheapest"):
            if not 0 <= getattr(self, name) < self.mixers:
                raise ValueError(
                    f"{name} must be a mixer from 0 to {self.mixers - 1}, got {getattr(self, name)}"
                )
        if (self.weights is None) == (self.kind == "weighted"):
            raise ValueError(
                "weights must be given with kind='weighted' and only with it,"
                f" got kind={self.kind!r} and weights={self.weights}"
            )
        if self.weights is not None:
            object.__setattr__(self, "weights", self._normalised(self.weights))
        object.__setattr__(self, "layouts", tuple(map(tuple, self.layouts)))
        object.__setattr__(self, "layout_probabilities", tuple(self.layout_probabilities))
        self._check_layouts()

    def _normalised(self, weights: Sequence[float]) -> tuple[float, ...]:
        if len(weights) != self.mixers:
            raise ValueError(
                f"weights must hold one number per mixer, got {len(weights)} for {self.mixers}"
            )
        if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
            raise ValueError(
                f"weights must be finite, at least 0, and not all 0, got {tuple(weights)}"
            )
        total = sum(map(Fraction, weights))
        return tuple(float(Fraction(weight) / total) for weight in weights)

    def _check_layouts(self) -> None:
        if len(self.layouts) != len(self.layout_probabilities):
            raise ValueError(
                "layout_probabilities must hold one probability per layout,"
                f" got {len(self.layout_probabilities)} for {len(self.layouts)}"
            )
        for layout in self.layouts:
            if len(layout) != len(self.layouts[0]):
                raise ValueError(
                    "layouts must all have one mixer per layer of the model,"
                    f" got lengths {len(self.layouts[0])} and {len(layout)}"
                )
            if not all(0 <= mixer < self.mixers for mixer in layout):
                raise ValueError(
                    f"layouts must name mixers from 0 to {self.mixers - 1}, got {layout}"
                )
        if not all(0 <= p <= 1 for p in self.layout_probabilities):
            raise ValueError(
                f"layout_probabilities must lie in [0, 1], got {self.layout_probabilities}"
            )
        if math.fsum(self.layout_probabilities) > 1:
            raise ValueError(
                "layout_probabilities must sum to at most 1,"
                f" got {math.fsum(self.layout_probabilities)}"
            )

    def check_layers(self, layers: int) -> None:
        """Raise ValueError unless this strategy can draw for a model of so many layers."""
        if layers < 1:
            raise ValueError(f"layers must be at least 1, got {layers}")
        if self.layouts and len(self.layouts[0]) != layers:
            raise ValueError(
                f"layers must be {len(self.layouts[0])}, the length of the layouts, got {layers}"
            )

    def marginals(self, layers: int) -> np.ndarray:
        """The probability that a layer takes a mixer: float64, [layers, mixers].

        layers: of the whole model. For the sandwich, which cycles, it is the average over a cycle.
        Raises ValueError where the layouts have another length.
        """
        self.check_layers(layers)
        uniform = np.full(self.mixers, 1 / self.mixers)
        if self.weights is not None:
            base = np.array(self.weights)
        elif self.kind == "sandwich":
            main, cheapest = np.eye(self.mixers)[[self.main, self.cheapest]]
            base = (main + cheapest + uniform) / 3
        else:  # the full layout treats all mixers alike
            base = uniform
        residual = 1 - math.fsum(self.layout_probabilities)
        marginals = np.tile(residual * base, (layers, 1))
        for layout, probability in zip(self.layouts, self.layout_probabilities, strict=True):
            marginals[np.arange(layers), layout] += probability
        return marginals


def thresholds(probabilities: Sequence[float]) -> list[int]:
    """Cumulative probabilities in units of 2⁻³², each rounded once from its exact value.

    A random 32-bit word picks the choice whose index is the number of thresholds not above it.
    Probabilities that sum to 1 end at 2³², which no word reaches.
    """
    return [round(total * 2**32) for total in accumulate(map(Fraction, probabilities))]
