"""The Triton kernel: the same bits as the textbook, and no host read.

Without a GPU it runs in the interpreter. tests/autotune/test_inspection.py compiles it.
"""

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tossup.kernels.routing import MixerTable, Strategy, draw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WORDS = st.integers(-(2**64), 2**65)


@st.composite
def draws(draw_from, most_layers: int, most_samples: int):
    """A strategy of any kind, and the other arguments of a draw."""
    layers = draw_from(st.integers(1, most_layers))
    mixers = draw_from(st.integers(1, 7))
    mixer = st.integers(0, mixers - 1)
    kind = draw_from(st.sampled_from(["uniform", "weighted", "full_layout", "sandwich"]))
    weights = None
    if kind == "weighted":
        weight = st.floats(0, 10, allow_nan=False)
        weights = draw_from(st.lists(weight, min_size=mixers, max_size=mixers).filter(any))
    layout = st.lists(mixer, min_size=layers, max_size=layers)
    layouts = draw_from(st.lists(layout, max_size=3))
    probabilities = draw_from(
        st.lists(st.floats(0, 1 / 3), min_size=len(layouts), max_size=len(layouts))
    )
    strategy = Strategy(
        mixers, kind, weights, layouts, probabilities,
        draw_from(mixer), draw_from(mixer), draw_from(st.booleans()),
    )  # fmt: skip
    batch = draw_from(st.integers(1, most_samples))
    return strategy, draw_from(WORDS), draw_from(WORDS), layers, batch


def assert_same_bits(ours: MixerTable, textbook: MixerTable):
    assert torch.equal(ours.table.cpu(), textbook.table)
    assert torch.equal(ours.count.cpu(), textbook.count)
    listed = torch.arange(textbook.samples.shape[-1]) < textbook.count[..., None]
    assert torch.equal(ours.samples.cpu()[listed], textbook.samples[listed])


def fixed_cases(layers: int):
    """A large table of each kind, with samples that do not fill a block."""

    def decorate(test):
        layouts = ((0, 1, 2, 3, 4, 5, 6) * layers)[:layers], (3,) * layers
        for kind, weights in [
            ("uniform", None),
            ("weighted", (1, 2, 0, 3, 0.5, 4, 0)),
            ("full_layout", None),
            ("sandwich", None),
        ]:
            strategy = Strategy(7, kind, weights, layouts, (0.25, 0.125), 6, 2, True)
            test = example((strategy, -(2**63) - 1, 2**63 + 12345, layers, 65))(test)
        return test

    return decorate


@settings(max_examples=60, deadline=None, derandomize=True)
@fixed_cases(layers=48)
@given(draws(most_layers=48, most_samples=65))
def test_cpu_gives_the_textbook_bits(arguments):
    assert_same_bits(draw(*arguments, impl="cpu"), draw(*arguments, impl="reference"))


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@fixed_cases(layers=16)  # the interpreter takes its time for each
@given(draws(most_layers=5, most_samples=65))
def test_kernel_gives_the_textbook_bits(arguments):
    ours = draw(*arguments, device=DEVICE, impl="triton")
    textbook = draw(*arguments, device="cpu", impl="reference")
    assert_same_bits(ours, textbook)
    assert torch.equal(ours.samples.cpu(), textbook.samples)  # what is behind a count, too: -1


def test_launching_reads_nothing_from_the_device(monkeypatch):
    """A meta tensor has no values, so reading one raises."""
    from tossup.kernels.routing import kernel

    launches = []
    monkeypatch.setattr(
        kernel, "draw_kernel", {(4,): lambda *args, **options: launches.append(args)}
    )
    layouts = ((0, 1, 0, 1, 0, 1),)
    strategy = Strategy(2, "weighted", (1, 2), layouts, (0.5,), per_sample=True)
    step = torch.zeros((), dtype=torch.int64, device="meta")
    drawn = draw(strategy, 1, step, 6, 3, stage=range(1, 5), impl="triton")
    assert len(launches) == 1 and drawn.table.shape == (4, 3) and drawn.samples.shape == (4, 2, 3)
    assert drawn.route(3, 1).count.device.type == "meta"
    assert MixerTable.of(drawn.table, 2, 3).count.shape == (4, 2)


def test_step_must_be_on_the_tables_device():
    step = torch.zeros((), dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match="step must be on the table's device, cpu, got meta"):
        draw(Strategy(2), 0, step, 2, 2, device="cpu", impl="triton")
