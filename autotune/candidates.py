"""The configurations that the tuner tries: a space for each kernel.

A space holds what a kernel can run at all: tiles that are powers of two, of up to 256 rows, and
TOKENS that divide the scan's chunks. What no compiler is needed to refuse is left out: tiles of
which a thread would hold more numbers than it has registers, or so few that it mostly waits.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product

from ..kernels.configs import Config, Fact, Key

Facts = Mapping[str, Fact]
Held = Callable[[Config, Facts], int]
THREADS, REGISTERS = 32, 65536  # of a warp, of a multiprocessor
OTHERS = 48  # registers that a thread needs beside what it holds


@dataclass(frozen=True)
class Space:
    """choices: the values of each key. held: how many numbers all threads of a program keep through
    its loop. least, most: how many of them a thread may hold."""

    choices: Callable[[Facts], Mapping[str, tuple[int, ...]]]
    held: Held
    least: int
    most: int


def candidates(key: Key, heuristic: Config) -> list[Config]:
    """All configurations that are worth compiling but the heuristic, in a fixed order.

    Raises ValueError for a kernel that has no space.
    """
    if key.kernel not in SPACES:
        raise ValueError(f"kernels that are tuned are {', '.join(SPACES)}, got {key.kernel}")
    space, facts = SPACES[key.kernel], dict(key.facts)
    choices = space.choices(facts)
    found: list[Config] = []
    for values in product(*choices.values()):
        config = dict(zip(choices, values, strict=True))
        warps = config.get("num_warps") or config["warps"]
        per_thread = space.held(config, facts) / (THREADS * warps)
        together = config.get("programs", 1) * warps * THREADS * (per_thread + OTHERS)
        if not space.least <= per_thread <= space.most or together > REGISTERS:
            continue
        if config != heuristic:
            found.append(config)
    return found


def by_descriptor(facts: Facts) -> tuple[int, ...]:
    """Whether tiles are loaded by descriptors: by pointers too where both can be."""
    return (0, 1) if facts["described"] else (0,)


def of_attention(facts: Facts) -> Mapping[str, tuple[int, ...]]:
    if facts["dtype"] == "torch.float32":  # no matrix unit: a tile of products is many instructions
        return {
            "BLOCK_M": (16, 32, 64), "BLOCK_N": (16, 32, 64), "num_warps": (4, 8),
            "num_stages": (1, 2), "described": (0,),
        }  # fmt: skip
    return {
        "BLOCK_M": (32, 64, 128), "BLOCK_N": (32, 64, 128), "num_warps": (4, 8),
        "num_stages": (2, 3, 4), "described": by_descriptor(facts),
    }  # fmt: skip


def of_decoding(facts: Facts) -> Mapping[str, tuple[int, ...]]:
    """Its queries fill one tile of 16 at most."""
    return {
        "BLOCK_M": (16,), "BLOCK_N": (16, 32, 64, 128), "num_warps": (1, 2, 4, 8),
        "num_stages": (1, 2) if facts["dtype"] == "torch.float32" else (2, 3, 4, 5),
        "described": (0,),
    }  # fmt: skip


def of_scan(facts: Facts) -> Mapping[str, tuple[int, ...]]:
    return {"BLOCK_DIM": (16, 32, 64, 128), "TOKENS": (1, 2, 4, 8), "num_warps": (1, 2, 4, 8)}


def of_convolution(facts: Facts) -> Mapping[str, tuple[int, ...]]:
    sides = (8, 16, 32, 64, 128, 256)
    return {"BLOCK_T": sides, "BLOCK_DIM": sides, "num_warps": (1, 2, 4, 8)}


def of_linear(facts: Facts) -> Mapping[str, tuple[int, ...]]:
    full = facts["left"] == "torch.float32"  # as in `of_attention`
    sides = (32, 64, 128) if full else (64, 128, 256)
    return {
        "rows": sides, "columns": sides, "inner": (16, 32) if full else (64, 128),
        "warps": (4, 8), "stages": (3, 4), "programs": (1, 2, 3),
        "described": by_descriptor(facts),
    }  # fmt: skip


def of_rotary(facts: Facts) -> Mapping[str, tuple[int, ...]]:
    return {"ROWS": (1, 2, 4, 8, 16, 32, 64, 128, 256), "num_warps": (1, 2, 4, 8)}


def of_update(facts: Facts) -> Mapping[str, tuple[int, ...]]:
    return {"BLOCK_DIM": (1, 2, 4, 8, 16, 32, 64, 128, 256), "num_warps": (1, 2, 4, 8)}


def of_elements(facts: Facts) -> Mapping[str, tuple[int, ...]]:
    """Blocks that divide a chunk of a parameter."""
    return {"BLOCK": (256, 512, 1024, 2048, 4096), "num_warps": (1, 2, 4, 8)}


def scores_and(sums: Callable[[Config], int]) -> Held:
    """A tile of scores, and `sums` rows of sums of head_dim."""

    def held(config: Config, facts: Facts) -> int:
        return config["BLOCK_M"] * config["BLOCK_N"] + sums(config) * int(facts["head_dim"])

    return held


def of_states(config: Config, facts: Facts) -> int:
    return config["BLOCK_DIM"] * int(facts["states"])


def of_tile(config: Config, facts: Facts) -> int:
    return config["BLOCK_T"] * config["BLOCK_DIM"]


def of_rows(config: Config, facts: Facts) -> int:
    return config["ROWS"] * int(facts["width"])


def of_channels(config: Config, facts: Facts) -> int:
    return config["BLOCK_DIM"]


def of_product(config: Config, facts: Facts) -> int:
    return config["rows"] * config["columns"]


def of_tensors(tensors: int) -> Held:
    return lambda config, facts: tensors * config["BLOCK"]


QUERIES = scores_and(lambda config: config["BLOCK_M"])
KEYS = scores_and(lambda config: 2 * config["BLOCK_N"])  # of dK and of dV

SPACES = {
    "flash_attention.forward": Space(of_attention, QUERIES, 16, 192),
    "flash_attention.decode": Space(of_decoding, QUERIES, 8, 192),
    "flash_attention.dq": Space(of_attention, QUERIES, 16, 192),
    "flash_attention.dkdv": Space(of_attention, KEYS, 16, 224),
    "selective_scan.forward": Space(of_scan, of_states, 4, 32),
    "selective_scan.backward": Space(of_scan, of_states, 4, 32),
    "causal_conv1d.forward": Space(of_convolution, of_tile, 4, 32),
    "causal_conv1d.backward": Space(of_convolution, of_tile, 4, 16),
    "rotary.forward": Space(of_rotary, of_rows, 1, 32),
    "repeat_groups.repeat": Space(of_convolution, of_tile, 4, 32),
    "repeat_groups.add_up": Space(of_convolution, of_tile, 4, 32),
    "selective_state_update.update": Space(of_update, of_states, 1, 32),
    "causal_conv1d_update.update": Space(of_update, of_channels, 1, 8),
    "linear.forward": Space(of_linear, of_product, 32, 128),
    "linear.weight_gradient": Space(of_linear, of_product, 32, 128),
    "adamw.norm": Space(of_elements, of_tensors(1), 4, 32),
    "adamw.scale": Space(of_elements, of_tensors(1), 4, 32),
    "adamw.step": Space(of_elements, of_tensors(4), 16, 128),  # parameter, gradient, moments
}
