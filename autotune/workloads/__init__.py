"""The registry: every op that is measured, and the shapes that benchmarks and gates take.

Benchmarks, `tossup bench`, device runs, gates and the tuner are all made from it. What a module of
a user's needs to add a workload is here too: bench/README.md shows one, and `--workloads` of
`tossup bench`, bench/gate.py and bench/record.py imports it.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from ..errors import said
from ..peaks import Floor
from .adamw import AdamW
from .attention import Attention
from .causal_conv1d import CausalConv1d
from .causal_conv1d_update import CausalConv1dUpdate
from .linear import Linear
from .repeat_groups import RepeatGroups
from .rotary import Rotary
from .selective_scan import SelectiveScan
from .selective_state_update import SelectiveStateUpdate
from .workload import (
    Advance,
    Calls,
    Expected,
    Index,
    MissingPeer,
    Prepared,
    Results,
    SequenceWorkload,
    Workload,
    by_torch,
    compiled,
    differentiable,
    first_results,
    normal,
    option,
    size,
)

__all__ = [
    "ALIASES",
    "ON_CPU",
    "ON_GPU",
    "OPS",
    "Advance",
    "Calls",
    "Expected",
    "Floor",
    "Index",
    "MissingPeer",
    "Prepared",
    "Results",
    "SequenceWorkload",
    "Workload",
    "build",
    "by_torch",
    "compiled",
    "differentiable",
    "first_results",
    "import_workloads",
    "keys",
    "normal",
    "op_named",
    "option",
    "shipped",
    "size",
]

OPS: dict[str, type[Workload]] = {
    kind.op: kind
    for kind in (
        Attention,
        SelectiveScan,
        CausalConv1d,
        Linear,
        Rotary,
        RepeatGroups,
        SelectiveStateUpdate,
        CausalConv1dUpdate,
        AdamW,
    )
}

# Names that are taken as well: of a function, and folder, whose op goes by a shorter one in records
ALIASES = {"flash_attention": "attention"}


def op_named(name: str) -> str:
    """An op of OPS, by its name there or another that is taken for it.

    Raises ValueError, one sentence, where there is none.
    """
    op = name if name in OPS else ALIASES.get(name, name)
    if op not in OPS:
        raise ValueError(f"OP takes {', '.join(OPS)}, got {name!r}")
    return op


def build(op: str, values: Mapping[str, Any], others: Sequence[str] = ()) -> Workload:
    """A workload of a user's shape; a key that is not given has its default.

    others: keys that the caller takes by itself, for the sentence that names all.
    Raises ValueError, one sentence, for an op or a key that is not known, or a wrong value.
    """
    op = op_named(op)
    known = keys(op)
    for key in values:
        if key not in known:
            raise ValueError(f"{op} takes the keys {', '.join([*known, *others])}, got {key!r}")
    return OPS[op](**values)


def keys(op: str) -> dict[str, tuple[Any, str]]:
    """The keys of an op: default and meaning."""
    return {f.name: (f.default, f.metadata["about"]) for f in OPS[op].keys()}


def import_workloads(modules: Sequence[str]) -> None:
    """Import modules, by name, that add workloads of their own to OPS, and shapes of them to ON_CPU
    and ON_GPU where these are to be measured beside those shipped.

    Raises ValueError, one sentence, for a module that cannot be imported.
    """
    for module in modules:
        try:
            import_module(module)
        except ImportError as error:
            raise ValueError(
                f"--workloads takes a module that can be imported, got {module!r}: {said(error)}"
            ) from error


def shipped(device_type: str) -> tuple[Workload, ...]:
    """The workloads of `make bench` and the gates on a CPU, and of a device run on a GPU."""
    return tuple(ON_GPU if device_type == "cuda" else ON_CPU)


ON_CPU: list[Workload] = [
    Attention(batch=2, seqlen=512, heads=8, kv_heads=8, head_dim=64, dtype="fp32"),
    SelectiveScan(batch=2, seqlen=512, dim=128, dtype="fp32"),
    SelectiveScan(batch=4, seqlen=512, dim=128, dtype="fp32", active=2),
    CausalConv1d(batch=2, seqlen=512, dim=128, dtype="fp32"),
    CausalConv1d(batch=1, seqlen=2048, dim=1024, dtype="fp32"),
    Linear(batch=2, seqlen=512, in_features=256, out_features=512, dtype="fp32"),
    Rotary(batch=2, seqlen=512, heads=8, head_dim=64, dtype="fp32"),
    RepeatGroups(batch=2, seqlen=512, dim=128, dtype="fp32"),
    SelectiveStateUpdate(batch=64, dim=1024, dtype="fp32"),
    CausalConv1dUpdate(batch=64, dim=1024, dtype="fp32"),
    AdamW(elements=1 << 15),
]

ON_GPU: list[Workload] = [
    *(
        Attention(batch=16384 // n, seqlen=n, heads=16, kv_heads=16)
        for n in (2048, 4096, 8192, 16384)
    ),
    Attention(batch=4, seqlen=4096, heads=32, kv_heads=8),
    Attention(batch=4, seqlen=4096, heads=32, kv_heads=32, head_dim=64),
    Attention(batch=2, seqlen=8192, heads=16, kv_heads=16, window=1023),
    Attention(batch=16, seqlen=8192, queries=1),
    Attention(batch=4, seqlen=8192, heads=16, kv_heads=16, sequences=8),
    Attention(batch=4, seqlen=4096, heads=16, kv_heads=16, active=2),
    Attention(batch=4, seqlen=4096, heads=16, kv_heads=16, active=0),
    SelectiveScan(batch=8, seqlen=4096, dim=4096),
    SelectiveScan(batch=8, seqlen=4096, dim=2048),
    SelectiveScan(batch=2, seqlen=2048, dim=2048, state=64),
    SelectiveScan(batch=1, seqlen=16384, dim=1024),
    SelectiveScan(batch=8, seqlen=4096, dim=4096, active=4),
    SelectiveScan(batch=8, seqlen=4096, dim=4096, active=0),
    CausalConv1d(batch=8, seqlen=4096, dim=4096),
    CausalConv1d(batch=2, seqlen=2048, dim=2048),
    CausalConv1d(batch=8, seqlen=4096, dim=4096, active=0),
    *(
        Linear(batch=batch, in_features=width, out_features=out)
        for batch, width, out in (
            (1, 2048, 2048), (4, 2048, 2048), (4, 2048, 8192), (4, 8192, 2048), (4, 4096, 4096)
        )
    ),
    Linear(batch=4, in_features=2048, out_features=2048, active=0),
    Rotary(batch=4, seqlen=4096, heads=16),
    RepeatGroups(batch=8, seqlen=4096),
    SelectiveStateUpdate(batch=64),
    SelectiveStateUpdate(batch=256, state=128),
    SelectiveStateUpdate(batch=64, active=0),
    CausalConv1dUpdate(batch=64),
    AdamW(),
    AdamW(active=1),
    AdamW(parameters=64, elements=1 << 14),
]  # fmt: skip
