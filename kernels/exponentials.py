"""Exponentials as a GPU computes them, by powers of two, and what is made of them."""

import triton
import triton.language as tl

# The two factors stand in functions: constants of a module would be compared at each launch with
# what they were when a kernel was compiled, in about a microsecond each.


@triton.jit
def in_base_2(x):
    """Convert a natural logarithm to base 2."""
    return x * 1.4426950408889634


@triton.jit
def in_base_e(x):
    """Convert a logarithm of base 2 to a natural one."""
    return x * 0.6931471805599453


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(in_base_2(-x)))


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp2(in_base_2(-x)))


@triton.jit
def softplus(x):
    """log(1 + eˣ) = max(x, 0) + log1p(e⁻ˡˣˡ). In float32 it is the identity above 20 by itself.

    The polynomial is log1p(e)/e on [0, 1], to 3e-8.
    """
    e = tl.exp2(in_base_2(-tl.abs(x)))
    p = e * 5.232690834e-03 - 2.950522862e-02
    p = p * e + 7.822594792e-02
    p = p * e - 1.366324574e-01
    p = p * e + 1.910600811e-01
    p = p * e - 2.484298199e-01
    p = p * e + 3.331909776e-01
    p = p * e - 4.999949336e-01
    p = p * e + 9.999999404e-01
    return p * e + tl.maximum(x, 0.0)
