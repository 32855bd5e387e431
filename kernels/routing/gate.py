"""How a Triton kernel follows a route: imported by kernels alone, as it imports Triton."""

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

# Scalars and rows of a plan, which begin anywhere in it
ANYWHERE = ["count_ptr", "samples_ptr", "written_ptr"]


def routed_jit(*unspecialized: str) -> Callable[[Callable[..., Any]], Any]:
    """triton.jit of a kernel that takes a route: compiled once for all layers and mixers, however
    their parts of the plan are aligned, and for all values of the arguments named."""
    return triton.jit(do_not_specialize=unspecialized, do_not_specialize_on_alignment=ANYWHERE)


@triton.jit
def active_sample(count_ptr, samples_ptr, place):
    """The sample in this place of the route, int64; -1 after the last: then the program returns.

    Without a route (both pointers None), every place is its own sample. Kernels load nothing before
    they know their sample, so that a program without one costs a single load.
    """
    sample = place.to(tl.int64)
    if count_ptr is not None:
        if place < tl.load(count_ptr):
            sample = tl.load(samples_ptr + place).to(tl.int64)
        else:
            sample = place.to(tl.int64) * 0 - 1
    return sample


@triton.jit
def active_samples(count_ptr, batch):
    """How many samples the route takes. Kernels load nothing before they know."""
    active = batch
    if count_ptr is not None:
        active = tl.load(count_ptr)
    return active


@triton.jit
def sample_at(samples_ptr, place):
    """The sample in a place of the route that is known to hold one, int64."""
    sample = place.to(tl.int64)
    if samples_ptr is not None:
        sample = tl.load(samples_ptr + place).to(tl.int64)
    return sample
