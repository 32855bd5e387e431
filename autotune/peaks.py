"""What a kernel does at least and a GPU at most: the floor under a kernel's time."""

from dataclasses import dataclass, fields
from functools import partial


@dataclass(frozen=True)
class Floor:
    """What our algorithms cannot do without, as the docstrings of kernels/*/kernel.py count it.

    Backward passes of attention and of the scan compute again what others may keep.

    bytes: to and from the memory of the GPU. matrix_flops: in 16 bits, which tensor cores do.
    float32_flops: of products in float32, which they do not. mufu: special functions, one for each
    exp2. instructions: all others, per lane.
    """

    bytes: float = 0
    matrix_flops: float = 0
    float32_flops: float = 0
    mufu: float = 0
    instructions: float = 0


@dataclass(frozen=True)
class Peak:
    """A GPU's most. Rates are per multiprocessor and cycle, of lanes and not of warps.

    bandwidth: bytes per second. processors: multiprocessors. clock: Hz, the highest.
    """

    bandwidth: float
    processors: int
    clock: float
    matrix_flops: float
    float32_flops: float
    mufu: float = 16
    instructions: float = 128

    def parts(self, floor: Floor) -> dict[str, float]:
        """Seconds that each kind of work takes by itself."""
        cycles = self.processors * self.clock
        rates = {"bytes": self.bandwidth} | {
            field.name: getattr(self, field.name) * cycles
            for field in fields(Floor)
            if field.name != "bytes"
        }
        return {kind: getattr(floor, kind) / rate for kind, rate in rates.items()}

    def seconds(self, floor: Floor) -> float:
        """The floor: all kinds of work at once, each at its peak."""
        return max(self.parts(floor).values())

    def binds(self, floor: Floor) -> str:
        """Which kind of work that is."""
        parts = self.parts(floor)
        return max(parts, key=parts.__getitem__)


# By the name that the driver gives. Bandwidths: NVIDIA's data sheets of A100 (June 2021), H100 SXM
# and H200 SXM. Multiprocessors, highest clock and rates: the whitepapers of the architectures and
# the CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions". The data sheets'
# 989 TFLOP/s are at 1.83 GHz; a floor takes the highest clock that the driver lets run, 1.98 GHz.
A100 = partial(Peak, processors=108, clock=1.41e9, matrix_flops=2048, float32_flops=128)
H100 = partial(Peak, processors=132, clock=1.98e9, matrix_flops=4096, float32_flops=256)
PEAKS = {
    "NVIDIA A100-SXM4-40GB": A100(bandwidth=1.555e12),
    "NVIDIA A100-SXM4-80GB": A100(bandwidth=2.039e12),
    "NVIDIA H100 80GB HBM3": H100(bandwidth=3.35e12),
    "NVIDIA H200": H100(bandwidth=4.8e12),
}
