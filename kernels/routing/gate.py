"""How a Triton kernel follows a route: imported by kernels alone, as it imports Triton."""

import triton
import triton.language as tl


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
