"""What holds for every op: odd shapes and views, one result alone, autocast, tracing, the choice.

Each op is written here as a function of one tensor, which it uses for several of its inputs.
"""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import Tensor

from tests.support import EXACT, every_backend, every_impl, far_apart, only_triton, route_of, seeded
from tossup.kernels.backend import load_backend, resolve_impl
from tossup.kernels.causal_conv1d import causal_conv1d
from tossup.kernels.causal_conv1d_update import causal_conv1d_update
from tossup.kernels.flash_attention import flash_attention
from tossup.kernels.linear import linear
from tossup.kernels.repeat_groups import repeat_groups
from tossup.kernels.rotary import rotary, rotary_angles
from tossup.kernels.routing import Route
from tossup.kernels.selective_scan import selective_scan
from tossup.kernels.selective_state_update import selective_state_update

DIM = 8


def split(x: Tensor, *sizes: int) -> Tensor:
    """The last axis as two, not by `unflatten`, which torch compiles in no device's context."""
    return x.view(*x.shape[:-1], *sizes)


def attend(x: Tensor, **options) -> tuple[Tensor, ...]:
    heads = split(x, 4, 2)
    return flash_attention(
        heads, heads[:, :, :2], heads[:, :, 2:], causal=True, return_lse=True, **options
    )


def scan(x: Tensor, **options) -> tuple[Tensor, ...]:
    states = split(x, 2, 4)
    rates = -torch.arange(1.0, 33).view(DIM, 4) / 16
    ones = torch.ones(DIM)
    first = x[:, :1].repeat(1, 4, 1).transpose(1, 2)
    return selective_scan(
        x, x, rates, states, states, ones, x, ones,
        delta_softplus=True, initial_state=first, return_final_state=True, **options,
    )  # fmt: skip


def convolve(x: Tensor, **options) -> tuple[Tensor, ...]:
    weight = torch.arange(4.0 * DIM).view(4, DIM).T.cos()
    before = x[:, :1].expand(-1, 3, -1)
    return causal_conv1d(
        x, weight, torch.ones(DIM), activation="silu",
        initial_state=before, return_final_state=True, **options,
    )  # fmt: skip


def turn(x: Tensor, **options) -> tuple[Tensor, ...]:
    angles = rotary_angles(torch.arange(x.shape[1]), 4)
    return (rotary(split(x, 2, 4), *angles, **options),)


def project(x: Tensor, **options) -> tuple[Tensor, ...]:
    weight = (torch.arange(6.0 * DIM).view(6, DIM) % 7 - 3) / 4  # sums of bfloat16 are exact
    return (linear(x, weight, **options),)


def repeat(x: Tensor, **options) -> tuple[Tensor, ...]:
    return (repeat_groups(x, 2, 3, **options),)


OPS = {
    "flash_attention": attend,
    "selective_scan": scan,
    "causal_conv1d": convolve,
    "rotary": turn,
    "linear": project,
    "repeat_groups": repeat,
}
PAIRS = ("flash_attention", "selective_scan", "causal_conv1d")  # of results
RESULTS = [(name, n) for name in OPS for n in range(2 if name in PAIRS else 1)]
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
every_result = pytest.mark.parametrize("op, result", [(OPS[o], n) for o, n in RESULTS])


def random(*shape: int, dtype=torch.float64) -> Tensor:
    return torch.randn(shape, generator=seeded(0), dtype=torch.float64).to(dtype)


def results_and_gradient(op, x: Tensor, **options) -> list[Tensor]:
    x = x.detach().requires_grad_()
    results = op(x, **options)
    loss = sum((result * torch.ones(()).to(result)).square().sum() for result in results)
    return [*results, *torch.autograd.grad(loss, x)]


VIEWS = {
    "no sample": lambda random: random(0, 5, DIM),
    "one token": lambda random: random(1, 1, DIM),
    "channels before time": lambda random: random(3, DIM, 5).transpose(1, 2),
    "every other channel": lambda random: random(2, 5, 2 * DIM)[..., ::2],
    "the same token again": lambda random: random(2, 1, DIM).expand(-1, 20, -1),
    "the same sample again": lambda random: random(1, 5, DIM).expand(3, -1, -1),
    "the same number again": lambda random: random(1, 1, 1).expand(2, 5, DIM),
}


@every_op
@every_backend
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views_of_any_kind(op, impl, view):
    dtype = EXACT[impl]
    x = view(partial(random, dtype=dtype))
    ours, expected = (results_and_gradient(op, x, impl=i) for i in (impl, "reference"))
    tolerance = 1e-7 if dtype == torch.float64 else 2e-4
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


@every_op
@every_backend
@pytest.mark.parametrize(
    "shape, strides",
    [((3, 2, DIM), (2**30 + 8, DIM, 1)), ((1, 5, DIM), (DIM, 2**29 + 8, 1))],
    ids=["samples far apart", "tokens far apart"],
)
def test_offsets_that_only_64_bits_hold_of_strides_that_32_do(op, impl, shape, strides):
    near = random(*shape, dtype=torch.bfloat16)
    far = torch.empty_strided(shape, strides, dtype=near.dtype)  # hardly touched
    ours, expected = (results_and_gradient(op, x, impl=impl) for x in (far.copy_(near), near))
    torch.testing.assert_close(ours, expected)


def scan_of_states(x: Tensor, **options) -> Tensor:
    """x: (1, tokens, states), B and C."""
    u, rates = torch.ones(*x.shape[:2], 4), -torch.ones(4, x.shape[-1]) / 8
    return selective_scan(u, u, rates, x.unsqueeze(2), x.unsqueeze(2), **options)


def update_of_states(x: Tensor, **options) -> Tensor:
    """x: (1, tokens, states), of which the first three are B, C and the channels' state."""
    u, rates = torch.ones(1, 1), -torch.ones(1, x.shape[-1]) / 8
    b, c, state = x[:, :1], x[:, 1:2], x[:, 2:3]
    out = selective_state_update(state, u, u, rates, b, c, **options)
    return torch.cat((out, state[:, 0]), -1)


def turn_channels(x: Tensor, **options) -> Tensor:
    angles = rotary_angles(torch.arange(x.shape[1]), x.shape[-1] - 2)
    return rotary(x.unsqueeze(2), *angles, **options)


@every_backend
@pytest.mark.parametrize("op", [scan_of_states, update_of_states, turn_channels])
def test_offsets_of_the_last_axis_that_only_64_bits_hold(op, impl):
    near = random(1, 3, 64, dtype=torch.bfloat16)
    ours, expected = op(far_apart(near), impl=impl), op(near, impl=impl)
    torch.testing.assert_close(ours, expected)


@every_op
@every_backend
def test_results_lie_in_memory_as_traced(op, impl):
    """A compiled graph goes by the strides that the fake promised."""
    x = random(3, DIM, 5, dtype=torch.float32).transpose(1, 2).requires_grad_()
    real = torch.compile(op, fullgraph=True, backend="aot_eager")(x, impl=impl)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        traced = op(mode.from_tensor(x), impl=impl)
    for result, promised in zip(op(x, impl=impl), traced, strict=True):
        assert result.stride() == promised.stride() and result.dtype == promised.dtype
    torch.testing.assert_close(real, op(x, impl=impl))


@every_result
@every_backend
@pytest.mark.parametrize("chosen", [None, (), (2,), (2, 0)])
def test_gradients_of_one_result_alone(op, result, impl, chosen):
    dtype = EXACT[impl]
    route = None if chosen is None else route_of(*chosen, batch=3)
    mine = list(range(3) if chosen is None else chosen)
    gradients = []
    for each in (impl, "reference"):
        x = random(3, 5, DIM, dtype=dtype).requires_grad_()
        out = op(x, impl=each, route=route)[result]
        (gradient,) = torch.autograd.grad(out[mine].square().sum(), x)
        gradients.append(gradient[mine])
    torch.testing.assert_close(*gradients)


@every_op
@every_impl
@pytest.mark.parametrize("batch", [2, 4])
def test_a_route_of_another_batch_is_refused(op, impl, batch):
    x = random(3, 5, DIM, dtype=EXACT[impl])
    with pytest.raises(ValueError, match=rf"route must be of 3 samples.* of shape \({batch},\)"):
        op(x, impl=impl, route=route_of(0, batch=batch))


@every_backend
@pytest.mark.parametrize("result", [0, 1])
@pytest.mark.parametrize("nobody", [False, True])
def test_weights_of_nobody_get_zeros(result, nobody, impl):
    route = route_of(batch=2) if nobody else None
    x = random(2, 5, DIM, dtype=torch.float32)
    states = split(x, 2, 4)
    rates = -torch.ones(DIM, 4).requires_grad_()
    results = selective_scan(
        x, x.abs(), rates, states, states, return_final_state=True, route=route, impl=impl
    )
    (gradient,) = torch.autograd.grad(results[result].sum(), rates)
    assert (gradient == 0).all() == nobody


@every_op
@every_backend
def test_half_precision_beside_float32_under_autocast(op, impl):
    """Linear layers hand out bfloat16 there, while parameters stay in float32."""
    linear = torch.nn.Linear(DIM, DIM)
    tokens = random(2, 5, DIM, dtype=torch.float32)
    with torch.autocast(tokens.device.type, torch.bfloat16):
        x = linear(tokens)
        results = op(x, impl=impl)
        sum(result.float().sum() for result in results).backward()
    expected = op(x, impl=impl)
    assert x.dtype == results[0].dtype == torch.bfloat16
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))
    assert linear.weight.grad.dtype == torch.float32 and linear.weight.grad.isfinite().all()


@every_backend
def test_products_and_attention_take_autocasts_dtype(impl):
    """As torch's own do: whatever reaches them in float32."""
    x, weight = random(2, 5, DIM, dtype=torch.float32), torch.eye(DIM)
    x.requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16):
        expected = torch.nn.functional.linear(x, weight)
        out = linear(x, weight, impl=impl)
        heads = split(x, 4, 2)
        attended = flash_attention(heads, heads.bfloat16(), heads, impl=impl)
        double = linear(x.double(), weight, impl="cpu")
    assert out.dtype == attended.dtype == torch.bfloat16 and torch.equal(out, expected)
    assert double.dtype == torch.float64
    (out.float().sum() + attended.float().sum()).backward()
    assert x.grad.dtype == torch.float32 and x.grad.isfinite().all()


@every_backend
def test_parameters_keep_their_dtype_in_gradients(impl):
    x = random(2, 5, DIM, dtype=torch.bfloat16).requires_grad_()
    states = split(x, 2, 4)
    weights = [torch.ones(DIM, 4), torch.ones(DIM), -torch.ones(DIM, 4), *torch.ones(2, DIM)]
    taps, bias, rates, skip, step_bias = (w.requires_grad_() for w in weights)
    convolved = causal_conv1d(x, taps, bias, activation="silu", impl=impl)
    out = selective_scan(
        convolved, x, rates, states, states, skip, x, step_bias, delta_softplus=True, impl=impl
    )
    inputs = [x, taps, bias, rates, skip, step_bias]
    assert out.dtype == torch.bfloat16
    for tensor, gradient in zip(inputs, torch.autograd.grad(out.sum(), inputs), strict=True):
        assert gradient.dtype == tensor.dtype and gradient.isfinite().all()


@every_op
@every_backend
def test_compiles_for_any_length_with_the_implementation_left_open(op, impl, monkeypatch):
    monkeypatch.setenv("TOSSUP_IMPL", impl)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=True)
    for seqlen in (3, 17, 40):
        x = random(2, seqlen, DIM, dtype=torch.float32)
        torch.testing.assert_close(compiled(x), op(x))


@every_op
def test_exports_with_a_batch_of_any_size(op):
    class Exported(torch.nn.Module):
        def forward(self, x):
            return op(x, impl="cpu")

    few, more = random(3, 5, DIM, dtype=torch.float32), random(4, 5, DIM, dtype=torch.float32)
    sizes = {"x": {0: torch.export.Dim("batch")}}
    exported = torch.export.export(Exported(), (few,), dynamic_shapes=sizes, strict=False)
    torch.testing.assert_close(exported.module()(more), op(more, impl="cpu"))


@every_op
@every_backend
def test_results_may_be_changed_in_place(op, impl):
    x = random(2, 5, DIM, dtype=EXACT[impl]).requires_grad_()
    for result in op(x, impl=impl):
        result.mul_(2)


@every_op
def test_eager_and_registered_gradients_are_the_same(op, monkeypatch):
    """Both ways there are: by a function of autograd's own, and by what torch.library registers."""
    x = random(2, 5, DIM)
    eager = results_and_gradient(op, x, impl="cpu")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    registered = results_and_gradient(op, x, impl="cpu")
    assert all(torch.equal(a, b) for a, b in zip(eager, registered, strict=True))
    nodes = [type(results[0].grad_fn).__name__ for results in (eager, registered)]
    assert nodes[1].startswith("GeneratedBackwardFor_tossup") and nodes[0] != nodes[1]


@every_op
@only_triton
def test_triton_refuses_float64_in_a_sentence(op, impl):
    with pytest.raises(ValueError, match="float64 runs with impl='cpu' or 'reference'"):
        op(random(1, 2, DIM), impl=impl)


@pytest.mark.parametrize("op", [attend, scan, convolve, turn, repeat], ids=lambda op: op.__name__)
@only_triton
def test_triton_refuses_more_samples_than_a_grid_holds(op, impl):
    x = torch.zeros(1, 1, DIM).expand(65536, -1, -1)
    with pytest.raises(ValueError, match="at most 65535 samples for impl='triton', got 65536"):
        op(x, impl=impl)


@pytest.mark.parametrize("op", [selective_state_update, causal_conv1d_update])
@only_triton
def test_triton_updates_no_more_samples_than_a_grid_holds(op, impl):
    batched = {selective_state_update: (0, 1, 2, 4, 5, 7), causal_conv1d_update: (0, 1)}[op]
    tensors = [
        t[:1].expand(65536, *t.shape[1:]) if place in batched else t
        for place, t in enumerate(tensors_of_ops()[op])
    ]
    with pytest.raises(ValueError, match="at most 65535 samples for impl='triton', got 65536"):
        op(*tensors, impl=impl)


@only_triton
def test_triton_refuses_a_longer_sequence_than_a_grid_holds(impl):
    longest = 65535 * 32  # of float32's tiles
    q, k = (torch.zeros(1, 1, 1, 16).expand(1, n, 1, 16) for n in (longest + 1, 1))
    with pytest.raises(ValueError, match=rf"most {longest} tokens .*, got {longest + 1}; of pack"):
        flash_attention(q, k, k, impl=impl)


@only_triton
def test_triton_refuses_more_programs_than_it_counts(impl):
    """Of packed sequences without max_seqlen_q, each could be as long as all together."""
    tokens = 2**15 * 32
    bounds = torch.zeros(2**11 + 1, dtype=torch.int32)
    bounds[-1] = tokens
    q = torch.zeros(1, 1, 1).expand(tokens, 32, 1)
    with pytest.raises(ValueError, match="less than 2³¹ programs, got 32 heads of 2048 sequences"):
        flash_attention(q, q, q, cu_seqlens_q=bounds, impl=impl)


@only_triton
def test_triton_refuses_more_states_than_registers_hold(impl):
    x, rates, states = torch.zeros(1, 2, 3), torch.zeros(3, 257), torch.zeros(1, 2, 1, 257)
    with pytest.raises(ValueError, match="at most 256 states for impl='triton', got 257"):
        selective_scan(x, x, rates, states, states, impl=impl)


@every_op
def test_launches_go_to_the_device_of_the_tensors(op, monkeypatch):
    """Triton launches on the current device, which may be another GPU than the tensors'."""
    entered = []
    context = torch.cuda.device_of

    def device_of(tensor):
        entered.append(tensor)
        return context(tensor)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    x = random(2, 5, DIM)
    results_and_gradient(op, x, impl="cpu")
    assert len(entered) == 2 and all(tensor.device == x.device for tensor in entered)


def tensors_of_ops():
    x, heads = torch.zeros(2, 5, DIM), torch.zeros(2, 5, 2, 4)
    rates, states, channels = torch.zeros(DIM, 4), torch.zeros(2, 5, 1, 4), torch.zeros(DIM)
    taps, angles = torch.zeros(DIM, 4), torch.zeros(5, 2)
    return {
        flash_attention: (heads, heads, heads),
        selective_scan: (x, x, rates, states, states, channels, x, channels),
        causal_conv1d: (x, taps, channels),
        rotary: (heads, angles, angles),
        linear: (x, torch.zeros(6, DIM), torch.zeros(6)),
        selective_state_update: (
            torch.zeros(2, DIM, 4), x[:, 0], x[:, 0], rates, states[:, 0], states[:, 0], channels,
            x[:, 0], channels,
        ),
        causal_conv1d_update: (x[:, 0], torch.zeros(2, 3, DIM), taps, channels),
    }  # fmt: skip


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("op", tensors_of_ops(), ids=lambda op: op.__name__)
def test_a_tensor_on_another_device_is_refused(op, impl):
    """torch describes a result that a meta tensor goes into, and returns memory nobody wrote."""
    tensors, route = tensors_of_ops()[op], route_of(0, 1, batch=2)
    op(*tensors, route=route, impl=impl)
    for place, tensor in enumerate(tensors):
        others = [*tensors[:place], tensor.to("meta"), *tensors[place + 1 :]]
        with pytest.raises(ValueError, match=r"on one device, got (cpu and meta|meta and cpu)"):
            op(*others, route=route, impl=impl)
    away = Route(route.count.to("meta"), route.samples.to("meta"))
    with pytest.raises(ValueError, match="on one device, got cpu and meta"):
        op(*tensors, route=away, impl=impl)


def test_implementations_are_chosen_by_argument_then_variable_then_device(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.delenv("TOSSUP_IMPL", raising=False)
    assert [resolve_impl("auto", device) for device in (cpu, cuda)] == ["cpu", "triton"]
    monkeypatch.setenv("TOSSUP_IMPL", "auto")
    assert [resolve_impl("auto", device) for device in (cpu, cuda)] == ["cpu", "triton"]
    monkeypatch.setenv("TOSSUP_IMPL", "reference")
    assert resolve_impl("auto", cuda) == "reference" and resolve_impl("triton", cpu) == "triton"
    monkeypatch.setenv("TOSSUP_IMPL", "gpu")
    with pytest.raises(ValueError, match=r"TOSSUP_IMPL must be auto, triton, cpu .* got 'gpu'"):
        resolve_impl("auto", cpu)
    with pytest.raises(ValueError, match=r"^impl must be auto, triton, cpu .* got 'gpu'"):
        resolve_impl("gpu", cpu)
    assert load_backend("tossup.kernels.routing", "triton").draw.__module__.endswith(".kernel")


@pytest.mark.parametrize("call", ["linear(x, x[0], ", "draw(tossup.Strategy(2), 0, 0, 1, 1, "])
def test_triton_on_the_cpu_says_what_it_takes(call):
    call = f"import torch, tossup; x = torch.ones(1, 2, 8); tossup.{call}impl='triton')"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-c", call], env=environment, text=True, capture_output=True
    )
    assert ran.stderr.splitlines()[-1].startswith(
        "ValueError: impl='triton' takes tensors on a GPU"
    )
