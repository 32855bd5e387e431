"""What goes wrong where kernels are measured, and how it is told in one line."""


class WrongResult(Exception):
    """Ours, further from the reference than allowed: nothing is timed."""


def said(error: BaseException, *, last: bool = False) -> str:
    """An error's first line, or its last, where Triton's say what is wrong; its kind where it says
    nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if last else 0]
