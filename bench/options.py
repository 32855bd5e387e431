"""What command lines here share: types of arguments, and the option for workloads of a user's."""

import argparse
import math


def count(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"takes a whole number from 1 on, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"takes a number of seconds above 0, got {text!r}")
    return value


def add_workloads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workloads", action="append", default=[], metavar="MODULE",
        help="import what adds workloads of yours; may be given again",
    )  # fmt: skip
