"""The placements that a search chooses from: how many layers each mixer may take."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product

from ..errors import ConfigError

Placement = tuple[str, ...]  # one mixer name per layer
Budgets = list[int] | dict[str, int]


@dataclass(frozen=True)
class SearchSpace:
    """Layers, mixers, and the budget of each mixer that is placed.

    layers: how many.
    mixers: the names, in the order in which the model declares them.
    budgets: layers per mixer, in the order in which the search places the mixers.
    filler: the mixer that takes all other layers.
    """

    layers: int
    mixers: tuple[str, ...]
    budgets: dict[str, int]
    filler: str

    @classmethod
    def from_budgets(
        cls,
        layers: int,
        mixers: Sequence[str],
        budgets: Budgets,
        filler: str | None = None,
        key: str = "budgets",
    ) -> "SearchSpace":
        """Check the budgets against the model.

        A list gives the first mixers their budgets in declared order. A dict names the mixers; they
        are placed in its order. filler: one without a budget, to be named if there are several, as
        the others then run nowhere.
        ConfigError names the budget that cannot be met; key is what the file calls budgets.
        """
        if len(set(mixers)) != len(mixers):
            raise ConfigError(f"mixers must have different names, got {list(mixers)}")
        for mixer in budgets if isinstance(budgets, Mapping) else ():
            if mixer not in mixers:
                raise ConfigError(f"{key} names {mixer!r}; the mixers are {list(mixers)}")
        if not 0 < len(budgets) < len(mixers):
            raise ConfigError(
                f"{key} takes a budget for one of the mixers {list(mixers)} or more, but not for "
                f"all, as one fills the other layers, got {len(budgets)} budgets"
            )
        if not isinstance(budgets, Mapping):
            budgets = dict(zip(mixers, budgets, strict=False))
        for mixer, count in budgets.items():
            if count <= 0:
                raise ConfigError(f"{key} gives {mixer!r} {count} layers; it must be at least 1")
        if sum(budgets.values()) > layers:
            counts = " + ".join(map(str, budgets.values()))
            raise ConfigError(f"{key} takes the model's {layers} layers at most, got {counts}")
        others = [mixer for mixer in mixers if mixer not in budgets]
        if filler is None and len(others) > 1:
            raise ConfigError(
                f"{key} leaves out {others}: name the one that takes all other layers as "
                f"{key.replace('budgets', 'filler')}, or give others a budget"
            )
        if filler is not None and filler not in others:
            raise ConfigError(
                f"{key.replace('budgets', 'filler')} takes one of {others}, which have no budget, "
                f"got {filler!r}"
            )
        return cls(layers, tuple(mixers), dict(budgets), filler or others[0])

    @property
    def order(self) -> tuple[str, ...]:
        """The mixers in the order in which they are placed; the filler is last."""
        return (*self.budgets, self.filler)

    def key(self, placement: Placement) -> tuple[tuple[int, ...], ...]:
        """Each mixer's layers, in the order of placing: sorts placements, and breaks ties."""
        return tuple(layers_of(placement, mixer) for mixer in self.order)

    def is_under_filled(self, placement: Placement) -> bool:
        """Whether a mixer has fewer layers than its budget."""
        return any(placement.count(mixer) < count for mixer, count in self.budgets.items())

    @property
    def size(self) -> int:
        """How many placements fill every budget exactly."""
        filled = (*self.budgets.values(), self.layers - sum(self.budgets.values()))
        return math.factorial(self.layers) // math.prod(map(math.factorial, filled))

    def __iter__(self) -> Iterator[Placement]:
        """The placements that fill every budget exactly, sorted by `key`."""
        return self._extend({}, list(self.budgets.items()))

    def _extend(self, fixed: dict[int, str], todo: list[tuple[str, int]]) -> Iterator[Placement]:
        if not todo:
            yield tuple(fixed.get(layer, self.filler) for layer in range(self.layers))
            return
        (mixer, count), *rest = todo
        free = [layer for layer in range(self.layers) if layer not in fixed]
        for chosen in combinations(free, count):
            yield from self._extend(fixed | dict.fromkeys(chosen, mixer), rest)


def layers_of(placement: Placement, mixer: str) -> tuple[int, ...]:
    """The layers in which `mixer` runs, ascending."""
    return tuple(layer for layer, name in enumerate(placement) if name == mixer)


def all_placements(layers: int, mixers: Sequence[str]) -> list[Placement]:
    """Every placement without any budget, len(mixers) ** layers of them."""
    return list(product(mixers, repeat=layers))
