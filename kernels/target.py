"""Which GPU a launch configuration is for: the one there, or the one only compiled for."""

import triton

# Multiprocessors of the largest GPU of an architecture that is sold
PROCESSORS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 120: 188}


def arch() -> int:
    """The current device's compute capability, as 90; 90 too in the interpreter, which has none."""
    if triton.knobs.runtime.interpret:
        return 90
    return triton.runtime.driver.active.get_current_target().arch


def processors() -> int:
    """How many multiprocessors that GPU has."""
    return PROCESSORS.get(arch(), 132)


def refuse_more_samples_than_programs(batch: int) -> None:
    """What launchers begin with whose grids have a sample on the second or third axis."""
    if batch > 65535:
        raise ValueError(f"the batch must be at most 65535 samples for impl='triton', got {batch}")
