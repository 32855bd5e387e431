"""The product of tiles, as all Triton kernels use it."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc=None):
    """a @ b, added to `acc`: [M, K] and [K, N] of one dtype to [M, N] in float32.

    float32 is multiplied as float32, not as TF32. The interpreter multiplies the bits of bfloat16
    as if they were integers, so there both are widened first, which changes no product.
    """
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")
