"""What goes wrong where kernels are measured, and how it is told in one line."""


class WrongResult(Exception):
    """Ours, further from the reference than allowed: nothing is timed."""


def said(error: BaseException, *, last: bool = False) -> str:
    """The first line of an error's message, or the last one, where Triton's say what is wrong; the
    error's type if it has no message."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if last else 0]
