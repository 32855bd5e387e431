"""How long a mixer takes at least on a GPU, and how long probably: an analytic model.

A mixer runs its ops one after the other, and none is faster than its floor at the GPU's peaks. That
sum is all that can be said of a GPU that nothing was measured on. Where the same mixers were
measured on it at other shapes, the ratio of what they took to their floors carries over.
"""

from collections.abc import Sequence
from statistics import geometric_mean

from .latency import Direction, Latency
from .peaks import Peak
from .workloads import Workload


def floor_of(ops: Sequence[Workload], peak: Peak, direction: Direction) -> float:
    """Seconds: the sum of the ops' floors, of all passes of the direction. What decodes has ops of
    its own, and of them the forward pass."""
    return sum(
        peak.seconds(op.floor(part))
        for op in ops
        for part in op.directions
        if part == "forward" or (direction == "forward+backward" and "+" not in part)
    )


def estimate(floor: float, factors: Sequence[float]) -> Latency:
    """A mixer's latency, by its floor in seconds and what it took elsewhere.

    factors: of each shape at which it was measured on the same GPU, measured time over floor.
    """
    if not factors:
        about = "the floor at the GPU's peaks; uncalibrated: not measured"
        return Latency(milliseconds=1e3 * floor, error=None, about=about)
    factor = geometric_mean(factors)
    shapes = f"{len(factors)} shape" + ("s" if len(factors) > 1 else "")
    about = f"{factor:.3g} × the floor, as measured at {shapes}; "
    error = None
    if len(factors) > 1:
        error = max(max(f / factor, factor / f) - 1 for f in factors)
        about += "the error is the largest there"
    else:
        about += "the error is not known: one shape shows no spread"
    return Latency(milliseconds=1e3 * floor * factor, error=error, about=about)
