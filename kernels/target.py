"""Which GPU a launch configuration is for: the one there, or the one only compiled for."""

import triton


def arch() -> int:
    """The current device's compute capability, as 90; 90 too in the interpreter, which has none."""
    if triton.knobs.runtime.interpret:
        return 90
    return triton.runtime.driver.active.get_current_target().arch
