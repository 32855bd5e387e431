"""Which GPU a launch configuration is for: the one there, or the one only compiled for."""

from functools import lru_cache
from typing import Any

import triton


def arch() -> int:
    """The current device's compute capability, as 90; 90 too in the interpreter, which has none."""
    if triton.knobs.runtime.interpret:
        return 90
    return triton.runtime.driver.active.get_current_target().arch


def processors() -> int:
    """How many multiprocessors that GPU has; 132, as an H200, in the interpreter."""
    if triton.knobs.runtime.interpret:
        return 132
    driver = triton.runtime.driver.active
    return processors_of(driver, driver.get_current_device())


@lru_cache(maxsize=16)
def processors_of(driver: Any, device: int) -> int:
    return driver.utils.get_device_properties(device)["multiprocessor_count"]
