"""The drop-in functions, against their upstreams' own references and signatures."""

import inspect
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.oracles import (
    mamba_inner_fn,
    mamba_inner_ref,
    selective_scan_fn,
    selective_scan_ref,
    selective_state_update,
    selective_state_update_ref,
)
from tossup.kernels import compat
from tossup.kernels.compat import bert_padding
from tossup.kernels.flash_attention import flash_attention


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradients(out: Tensor, leaves) -> tuple[Tensor, ...]:
    dout = torch.linspace(-1, 1, out.numel()).sin().view(out.shape)
    return torch.autograd.grad(out, leaves, dout)


class Called(TorchDispatchMode):
    """Which of torch's ops were called."""

    def __init__(self):
        super().__init__()
        self.ops = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops.add(op)
        return op(*args, **(kwargs or {}))


def parameters(function) -> list[tuple[str, object]]:
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize(
    "theirs",
    [selective_scan_fn, selective_scan_ref, mamba_inner_fn, selective_state_update],
    ids=lambda f: f.__name__,
)
def test_signatures_are_those_of_mamba_ssm(theirs):
    assert parameters(getattr(compat, theirs.__name__)) == parameters(theirs)


OPTIONS = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "alibi_slopes=None, deterministic=False, return_attn_probs=False"
)
VARLEN = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
# As flash-attn 2.8.3 and causal-conv1d 1.7.0 declare them
DECLARED = {
    "flash_attn_func": f"q, k, v, {OPTIONS}",
    "flash_attn_qkvpacked_func": f"qkv, {OPTIONS}",
    "flash_attn_kvpacked_func": f"q, kv, {OPTIONS}",
    "flash_attn_varlen_func": f"q, k, v, {VARLEN}, {OPTIONS}, block_table=None",
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {OPTIONS}",
    "flash_attn_varlen_kvpacked_func": f"q, kv, {VARLEN}, {OPTIONS}",
    "flash_attn_with_kvcache": (
        "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,"
        " cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None,"
        " causal=False, window_size=(-1, -1), softcap=0.0, rotary_interleaved=True,"
        " alibi_slopes=None, num_splits=0, return_softmax_lse=False"
    ),
    "causal_conv1d_fn": (
        "x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, "
        "final_states_out=None, activation=None"
    ),
    "causal_conv1d_update": (
        "x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, "
        "conv_state_indices=None"
    ),
}


@pytest.mark.parametrize("name", DECLARED)
def test_signatures_are_those_of_the_others(name):
    declared: dict = {}
    exec(f"def function({DECLARED[name]}): ...", declared)
    assert parameters(getattr(compat, name)) == parameters(declared["function"])


def scan_inputs(groups: int, constant: bool) -> dict[str, Tensor]:
    variable = (2, groups, 4, 19) if groups > 1 else (2, 4, 19)
    shape = (6, 4) if constant else variable
    inputs = {
        "u": normal(2, 6, 19),
        "delta": normal(2, 6, 19, seed=1),
        "A": -normal(6, 4).exp(),
        "B": normal(*shape, seed=2),
        "C": normal(*variable, seed=3),
        "D": normal(6),
        "z": normal(2, 19, 6).transpose(1, 2),
        "delta_bias": normal(6, seed=4),
    }
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


@pytest.mark.parametrize("groups, constant", [(1, False), (2, False), (1, True)])
def test_selective_scan_fn_agrees_with_mamba_ssm(groups, constant):
    inputs = scan_inputs(groups, constant)
    options = {"delta_softplus": True, "return_last_state": True}
    out, state = compat.selective_scan_fn(**inputs, **options)
    expected, expected_state = selective_scan_ref(**inputs, **options)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, expected_state, rtol=1e-5, atol=1e-5)
    assert not state.requires_grad
    leaves = list(inputs.values())
    for ours, theirs in zip(gradients(out, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_selective_scan_ref_is_mamba_ssms():
    """Whose last state has a gradient."""
    inputs = scan_inputs(2, False)
    leaves = list(inputs.values())
    (out, state), (expected, expected_state) = (
        scan(**inputs, delta_softplus=True, return_last_state=True)
        for scan in (compat.selective_scan_ref, selective_scan_ref)
    )
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    ours, theirs = gradients(state, leaves[:4]), gradients(expected_state, leaves[:4])
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"u": normal(6, 19)}, r"u must be \(batch, dim, seqlen\), .* got \(6, 19\) of"),
        ({"delta": normal(2, 3, 19)}, r"delta must be of shape \(2, 6, 19\), got \(2, 3, 19\)"),
        ({"z": normal(2, 19, 6)}, r"z must be of shape \(2, 6, 19\), got \(2, 19, 6\)"),
        ({"A": normal(4, 6)}, r"A must be of shape \(6, 6\), got \(4, 6\)"),
        ({"A": normal(6)}, r"A must be of shape \(6, 6\), got \(6,\)"),
        ({"B": normal(2, 19, 4)}, r"B must be .* \(2, 4, 19\), or .* got \(2, 19, 4\)"),
        ({"C": normal(2, 5, 4, 19)}, r"C must be .* groups dividing dim, got \(2, 5, 4, 19\)"),
        ({"C": normal(4)}, r"C must be \(dim, state\) = \(6, 4\), .* got \(4,\)"),
    ],
)
def test_a_scan_is_refused_in_its_callers_layout(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        compat.selective_scan_fn(**(scan_inputs(1, False) | change))


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"xz": normal(2, 10, 11)}, r"conv1d_weight must be of shape \(5, 1, 4\), got \(6, 1, 4\)"),
        ({"xz": normal(2, 13, 11)}, r"xz must be \(batch, 2 dim, seqlen\), got \(2, 13, 11\)"),
        ({"conv1d_weight": normal(6, 4)}, r"conv1d_weight must be of shape \(6, 1, 4\), got"),
        (
            {"x_proj_weight": normal(9, 6)},
            r"x_proj_weight must be of shape \(10, 6\), got \(9, 6\)",
        ),
        ({"delta_proj_weight": normal(2, 6)}, r"delta_proj_weight must be of shape \(6, 6\), got"),
        (
            {"out_proj_weight": normal(6, 5)},
            r"out_proj_weight must be of shape \(6, 6\), got \(6, 5\)",
        ),
        ({"B": normal(2, 11, 4), "x_proj_weight": normal(6, 6)}, r"B must be .* got \(2, 11, 4\)"),
    ],
)
def test_a_block_is_refused_in_its_callers_layout(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        compat.mamba_inner_fn(**(inner_inputs("") | change))


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"state": normal(8, 5)}, r"state must be \(batch, dim, state\) or .* got \(8, 5\)"),
        ({"x": normal(3, 48)}, r"x must be of shape \(3, 6, 8\), got \(3, 48\)"),
        ({"dt": normal(3, 6)}, r"dt must be of shape \(3, 6, 8\), got \(3, 6\)"),
        ({"A": normal(6)}, r"A must be of shape \(6, 8, 5\), got \(6,\)"),
        ({"B": normal(3, 4, 5)}, r"B must be .* ngroups dividing 6, got \(3, 4, 5\)"),
        ({"C": normal(3, 5, 1)}, r"C must be \(batch, state\) = \(3, 5\), .* got \(3, 5, 1\)"),
        ({"D": normal(8)}, r"D must be of shape \(6, 8\), got \(8,\)"),
    ],
)
def test_a_step_of_the_scan_is_refused_in_its_callers_layout(change, sentence):
    inputs = {"state": normal(3, 6, 8, 5), "x": normal(3, 6, 8), "dt": normal(3, 6, 8)}
    inputs |= {"A": normal(6, 8, 5), "B": normal(3, 2, 5), "C": normal(3, 2, 5)}
    compat.selective_state_update(**inputs)
    with pytest.raises(ValueError, match=sentence):
        compat.selective_state_update(**(inputs | change))


def test_a_convolution_is_refused_in_its_callers_layout():
    x, weight = normal(2, 7, 9), normal(7, 4)
    for change, sentence in (
        ({"x": x[0]}, r"x must be \(batch, dim, seqlen\), .* got \(7, 9\) of"),
        ({"weight": normal(9, 4)}, r"weight must be \(dim, width\) = \(7, 2 to 4\), got \(9, 4\)"),
        ({"initial_states": x[..., :2]}, r"initial_states must be of shape \(2, 7, 3\), got"),
        ({"final_states_out": x[:1, :, :3]}, r"final_states_out must be of shape \(2, 7, 3\), got"),
    ):
        with pytest.raises(ValueError, match=sentence):
            compat.causal_conv1d_fn(**({"x": x, "weight": weight} | change))
    state, six = normal(2, 7, 4), normal(2, 7, 6)
    for step, change, sentence in (
        (x[0, 0], {}, r"x must be \(batch, dim\) or \(batch, dim, seqlen\), got \(9,\)"),
        (x[..., 0], {"weight": normal(7, 5)}, r"weight must be .* 2 to 4\), got \(7, 5\)"),
        (x[..., 0], {"conv_state": state.mT}, r"\(entries, 7, at least 3\), got \(2, 4, 7\)"),
        (six, {"cache_seqlens": torch.zeros(2).int()}, r"at least 6\), got \(2, 7, 4\)"),
    ):
        with pytest.raises(ValueError, match=sentence):
            options = {"conv_state": state, "weight": weight} | change
            compat.causal_conv1d_update(step, **options)


def test_a_complex_A_is_refused():
    inputs = scan_inputs(1, False)
    with pytest.raises(NotImplementedError, match=r"A must be real, got torch.complex64"):
        compat.selective_scan_fn(**(inputs | {"A": inputs["A"].detach().cfloat()}))


def inner_inputs(constant: str) -> dict[str, Tensor | None]:
    """constant: which of B and C are given, and not projected."""
    dim, state, rank, hidden = 6, 4, 2, 5
    projected = rank + state * (2 - len(constant))
    return {
        "xz": normal(2, 2 * dim, 11),
        "conv1d_weight": normal(dim, 1, 4),
        "conv1d_bias": normal(dim),
        "x_proj_weight": normal(projected, dim, seed=1),
        "delta_proj_weight": normal(dim, rank, seed=2),
        "out_proj_weight": normal(hidden, dim, seed=3),
        "out_proj_bias": normal(hidden),
        "A": -normal(dim, state).exp(),
        "B": normal(dim, state, seed=4) if "B" in constant else None,
        "C": normal(dim, state, seed=9) if "C" in constant else None,
        "D": normal(dim, seed=5),
        "delta_bias": normal(dim, seed=6),
        "B_proj_bias": None if "B" in constant else normal(state, seed=7),
        "C_proj_bias": None if "C" in constant else normal(state, seed=8),
    }


@pytest.mark.parametrize("constant", ["", "B", "C", "BC"])
def test_mamba_inner_fn_agrees_with_mamba_ssm(constant):
    inputs = inner_inputs(constant)
    leaves = [t.requires_grad_() for t in inputs.values() if t is not None]
    ours = compat.mamba_inner_fn(**inputs)
    theirs = mamba_inner_ref(**inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for got, expected in zip(gradients(ours, leaves), gradients(theirs, leaves), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_mamba_inner_fn_normalises_what_it_is_told_to():
    """b, c and dt are divided by their root mean square, after the projections' biases; in
    mamba-ssm only its CUDA path does so."""
    inputs = inner_inputs("")
    weights = {"b_rms_weight": normal(4), "c_rms_weight": normal(4, seed=1)}
    weights["dt_rms_weight"] = normal(6, seed=2)
    x, z = inputs["xz"].chunk(2, dim=1)
    taps = F.conv1d(F.pad(x, (3, 0)), inputs["conv1d_weight"], inputs["conv1d_bias"], groups=6)
    x = F.silu(taps)
    dt, b, c = (inputs["x_proj_weight"] @ x).split((2, 4, 4), dim=1)
    dt = inputs["delta_proj_weight"] @ dt
    b, c = b + inputs["B_proj_bias"][:, None], c + inputs["C_proj_bias"][:, None]
    dt, b, c = (
        F.rms_norm(t.mT, t.shape[1:2], weights[f"{name}_rms_weight"], eps=1e-3).mT
        for name, t in (("dt", dt), ("b", b), ("c", c))
    )
    y = selective_scan_ref(
        x, dt, inputs["A"], b, c, inputs["D"], z, inputs["delta_bias"], delta_softplus=True
    )
    expected = F.linear(y.mT, inputs["out_proj_weight"], inputs["out_proj_bias"])
    ours = compat.mamba_inner_fn(**inputs, **weights, b_c_dt_rms_eps=1e-3)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["B", "C"])
def test_mamba_inner_fn_normalises_nothing_constant(name):
    weight = {f"{name.lower()}_rms_weight": normal(4)}
    with pytest.raises(ValueError, match=f"must be None for a constant {name}"):
        compat.mamba_inner_fn(**inner_inputs("BC"), **weight)


def test_mamba_inner_fn_takes_a_wider_bias_of_its_output():
    """As transformers hands it over."""
    inputs = inner_inputs("")
    wide = inputs["out_proj_bias"] + 2.0**-12
    narrow = {n: t if t is None else t.bfloat16() for n, t in inputs.items()}
    narrow |= {"A": inputs["A"], "D": inputs["D"], "delta_bias": inputs["delta_bias"]}
    expected = compat.mamba_inner_fn(**narrow | {"out_proj_bias": wide.bfloat16()})
    out = compat.mamba_inner_fn(**narrow | {"out_proj_bias": wide})
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)


@pytest.mark.parametrize("heads, groups", [(None, 1), (6, 1), (6, 3)])
def test_selective_state_update_agrees_with_mamba_ssm(heads, groups):
    of = () if heads is None else (heads,)
    state = normal(3, *of, 8, 5)
    inputs = {
        "x": normal(3, *of, 8, seed=1),
        "dt": normal(3, *of, 8, seed=2),
        "A": -normal(*of, 8, 5).exp(),
        "B": normal(3, groups, 5) if heads else normal(3, 5),
        "C": normal(3, groups, 5, seed=3) if heads else normal(3, 5, seed=3),
        "D": normal(*of, 8, seed=4),
        "z": normal(3, *of, 8, seed=5),
        "dt_bias": normal(*of, 8, seed=6),
    }
    ours, theirs = state.clone(), state.clone()
    out = compat.selective_state_update(ours, **inputs, dt_softplus=True)
    expected = selective_state_update_ref(theirs, **inputs, dt_softplus=True)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, theirs)

    entries = torch.tensor([4, -1, 2])
    many = normal(6, *of, 8, 5, seed=7)
    before = many.clone()
    gathered = many[[4, 0, 2]]
    expected = selective_state_update_ref(gathered, **inputs)
    out = compat.selective_state_update(many, **inputs, state_batch_indices=entries.int())
    torch.testing.assert_close(out[[0, 2]], expected[[0, 2]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(many[[4, 2]], gathered[[0, 2]])
    assert (out[1] == 0).all() and torch.equal(many[[0, 1, 3, 5]], before[[0, 1, 3, 5]])


def test_selective_state_update_of_one_head_whose_stride_says_nothing():
    """Flattening heads that are one is a view whatever their stride, so nothing is copied back."""
    state = normal(2, 4, 1, 3).transpose(1, 2)
    inputs = [normal(2, 1, 4), normal(2, 1, 4, seed=1), -normal(1, 4, 3).exp()]
    inputs += [normal(2, 1, 3), normal(2, 1, 3, seed=3)]
    ours, theirs = state.clone(memory_format=torch.preserve_format), state.clone()
    assert ours.stride() == state.stride()
    out = compat.selective_state_update(ours, *inputs)
    torch.testing.assert_close(out, selective_state_update_ref(theirs, *inputs))
    torch.testing.assert_close(ours, theirs)


def test_selective_state_update_writes_heads_that_lie_apart():
    """Heads and channels are no single view then."""
    state = torch.cat([normal(2, 3, 4, 5), normal(2, 3, 1, 5, seed=9)], 2)[:, :, :4]
    inputs = [normal(2, 3, 4), normal(2, 3, 4, seed=1), -normal(3, 4, 5).exp()]
    inputs += [normal(2, 1, 5), normal(2, 1, 5, seed=3)]
    theirs = state.clone()
    out = compat.selective_state_update(state, *inputs)
    torch.testing.assert_close(out, selective_state_update_ref(theirs, *inputs))
    torch.testing.assert_close(state, theirs)


@pytest.mark.parametrize("channel_last", [False, True])
@pytest.mark.parametrize("activation", [None, "silu", "swish"])
def test_causal_conv1d_fn_agrees_with_torch(channel_last, activation):
    x, weight, bias = normal(2, 7, 9), normal(7, 4), normal(7)
    x = x.transpose(1, 2).contiguous().transpose(1, 2) if channel_last else x
    before = normal(2, 7, 3, seed=1)
    leaves = [t.requires_grad_() for t in (x, weight, bias, before)]
    final = torch.empty(2, 3, 7).transpose(1, 2)
    out, state = compat.causal_conv1d_fn(
        x, weight, bias, initial_states=before, return_final_states=True, final_states_out=final,
        activation=activation,
    )  # fmt: skip
    inputs = torch.cat([before, x], -1)
    expected = F.conv1d(inputs, weight.unsqueeze(1), bias, groups=7)
    expected = F.silu(expected) if activation else expected
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(state, inputs[..., -3:]) and torch.equal(state, final)
    assert not final.requires_grad
    with torch.no_grad():
        _, state = compat.causal_conv1d_fn(
            x, weight, bias, initial_states=before, return_final_states=True, final_states_out=final
        )
    assert state is final
    for got, theirs in zip(gradients(out, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(got, theirs, rtol=1e-5, atol=1e-5)


def test_compiled_the_final_states_that_are_written_somewhere_keep_their_gradient():
    x, weight = normal(1, 2, 5).requires_grad_(), normal(2, 3)

    def final(x, buffer):
        out, state = compat.causal_conv1d_fn(
            x, weight, return_final_states=True, final_states_out=buffer
        )
        return out, state

    compiled = torch.compile(final, backend="aot_eager", fullgraph=True)
    results = []
    for function in (compiled, final):
        buffer = torch.zeros(1, 2, 2)
        out, state = function(x, buffer)
        results.append((buffer, *torch.autograd.grad(state.sum() + 0 * out.sum(), x)))
    torch.testing.assert_close(*results)
    assert results[0][1].count_nonzero() == 4


def test_causal_conv1d_fn_gives_zeros_for_padding():
    x, weight = normal(1, 3, 6), normal(3, 2)
    seq_idx = torch.tensor([[0, 0, 1, 1, -1, -1]], dtype=torch.int32)
    out = compat.causal_conv1d_fn(x, weight, seq_idx=seq_idx)
    for tokens in (slice(0, 2), slice(2, 4)):
        alone = compat.causal_conv1d_fn(x[..., tokens], weight)
        torch.testing.assert_close(out[..., tokens], alone)
    assert (out[..., 4:] == 0).all()


def test_causal_conv1d_update_steps_along():
    x, weight, bias = normal(2, 7, 5), normal(7, 3), normal(7)
    state = torch.zeros(2, 7, 4)
    whole = compat.causal_conv1d_fn(x, weight, bias, activation="silu")
    first = compat.causal_conv1d_update(x[..., :3], state, weight, bias, "silu")
    second = compat.causal_conv1d_update(x[..., 3], state, weight, bias, "swish")
    torch.testing.assert_close(torch.cat([first, second[..., None]], -1), whole[..., :4])
    assert torch.equal(state, x[..., :4])

    entries = torch.full((5, 7, 4), 9.0)  # of which each sample has one
    places = torch.tensor([3, 1], dtype=torch.int32)
    entries[places.long()] = 0
    for tokens in (x[..., :3], x[..., 3:4]):
        compat.causal_conv1d_update(
            tokens, entries, weight, bias, "silu", conv_state_indices=places
        )
    assert torch.equal(entries[[3, 1]], x[..., :4]) and (entries[[0, 2, 4]] == 9).all()


def test_other_activations_are_refused():
    with pytest.raises(NotImplementedError, match=r"activation must be .* got 'relu'"):
        compat.causal_conv1d_fn(normal(1, 3, 6), normal(3, 2), activation="relu")
    with pytest.raises(NotImplementedError, match=r"activation must be .* got 'relu'"):
        compat.causal_conv1d_update(normal(1, 3), normal(1, 3, 2), normal(3, 2), None, "relu")


QKV = normal(2, 9, 3, 4, 8)
BOUNDS = torch.tensor([0, 5, 9, 18], dtype=torch.int32)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_attention_in_every_packing_is_the_same(dropout_p, monkeypatch):
    options = dict(causal=True, window_size=(3, -1), softcap=4.0, softmax_scale=0.5)
    options |= dict(alibi_slopes=torch.tensor([0.5, 0.25, 0.1, 0.7]), dropout_p=dropout_p)
    torch.manual_seed(0)
    seeded = partial(flash_attention, dropout_seed=torch.tensor(5) if dropout_p else None)
    monkeypatch.setattr("tossup.kernels.compat.flash_attn.flash_attention", seeded)
    q, k, v = QKV.unbind(2)
    expected = seeded(q, k, v, **options)
    assert not torch.equal(expected, flash_attention(q, k, v, **options | {"dropout_p": 0.2}))
    torch.testing.assert_close(compat.flash_attn_func(q, k, v, **options), expected)
    torch.testing.assert_close(compat.flash_attn_qkvpacked_func(QKV, **options), expected)
    kv = QKV[:, :, 1:]
    torch.testing.assert_close(compat.flash_attn_kvpacked_func(q, kv, **options), expected)

    flat = QKV.flatten(0, 1)
    q, k, v = flat.unbind(1)
    expected = seeded(q, k, v, cu_seqlens_q=BOUNDS, **options)
    bounds = (BOUNDS, BOUNDS, 9, 9)
    for ours in (
        compat.flash_attn_varlen_func(q, k, v, *bounds, **options),
        compat.flash_attn_varlen_kvpacked_func(q, flat[:, 1:], *bounds, **options),
        compat.flash_attn_varlen_qkvpacked_func(flat, BOUNDS, 9, **options),
    ):
        torch.testing.assert_close(ours, expected)


def test_a_window_as_wide_as_the_keys_shows_all_of_them_to_queries_before_the_first():
    q, (k, v) = QKV[:, :, 0], (x[:, :4] for x in QKV[:, :, 1:].unbind(2))
    everything = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    out = compat.flash_attn_func(q, k, v, window_size=(0, 4))
    torch.testing.assert_close(out[:, :6], everything.transpose(1, 2)[:, :6])
    narrower = compat.flash_attn_func(q, k, v, window_size=(0, 3))
    assert (narrower[:, :2] == 0).all()  # they stand 5 and 4 places before the first key


def test_attention_agrees_with_torch_and_gives_the_gradient_of_the_packed_tensor():
    qkv = QKV.clone().requires_grad_()
    out, lse, mask = compat.flash_attn_qkvpacked_func(qkv, causal=True, return_attn_probs=True)
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradients(out, [qkv]), gradients(expected, [qkv]))
    scores = (q @ k.mT * 8**-0.5).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    assert mask.numel() == 0


def test_attention_refuses_what_it_cannot_give():
    q, k, v = QKV.unbind(2)
    with pytest.raises(NotImplementedError, match="return_attn_probs must be False"):
        compat.flash_attn_func(q, k, v, dropout_p=0.5, return_attn_probs=True)
    with pytest.raises(NotImplementedError, match="block_table must be None"):
        compat.flash_attn_varlen_func(
            *QKV[0].unbind(1), BOUNDS[:3], BOUNDS[:3], 5, 5, block_table=BOUNDS
        )
    with pytest.raises(ValueError, match=r"window_size must be \(left, right\), got 3"):
        compat.flash_attn_func(q, k, v, window_size=3)
    with pytest.raises(ValueError, match=r"qkv must be .* 3, heads, head_dim"):
        compat.flash_attn_qkvpacked_func(QKV[:, :, :2])


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(v=None), "k and v must come together, got k alone"),
        (dict(k=None), "k and v must come together, got v alone"),
        (dict(rotary_cos=normal(16, 2)), "must come together, got rotary_cos alone"),
        (
            dict(k=None, v=None, rotary_cos=normal(16, 2), rotary_sin=normal(16, 2)),
            "rotary_cos must be None where k is None",
        ),
        (dict(cache_seqlens=None), "cache_seqlens must say where to write k"),
        (dict(cache_seqlens=15), "leave room for k in the 16 places .* got 15 and 2 new ones"),
        (dict(cache_seqlens=-1), "leave room for k"),
        (dict(cache_seqlens=torch.tensor([3])), r"an int or \(batch,\) = \(2,\), got \(1,\)"),
        (dict(block_table=torch.zeros(2, 2)), "block_table must be None"),
        (dict(window_size=3), r"window_size must be \(left, right\), got 3"),
    ],
)
def test_a_step_that_does_not_fit_its_cache_is_refused(change, message):
    cache = normal(2, 16, 4, 8)
    before, (q, k, v) = cache.clone(), QKV[:, :2].unbind(2)
    options = dict(k=k, v=v, cache_seqlens=3) | change
    with pytest.raises((ValueError, NotImplementedError), match=message):
        compat.flash_attn_with_kvcache(q, cache, cache, **options)
    assert torch.equal(cache, before)


@pytest.mark.parametrize("on_device", [False, True])
def test_a_step_makes_no_log_sum_exp_that_nobody_asked_for(on_device):
    """Each layer and token would launch what mends it."""
    q, cache = QKV[:, :1, 0], normal(2, 16, 4, 8)
    filled = torch.tensor([3, 7], dtype=torch.int32) if on_device else 5
    for wanted in (False, True):
        with Called() as called:
            compat.flash_attn_with_kvcache(
                q, cache, cache, cache_seqlens=filled, return_softmax_lse=wanted
            )
        assert (torch.ops.aten.isneginf.default in called.ops) is wanted


@pytest.mark.parametrize("on_device", [False, True])
def test_a_cache_that_grows_gives_what_the_whole_gives(on_device):
    q, k, v = QKV.unbind(2)
    keys, values = torch.full((2, 2, 16, 4, 8), 1e4).unbind()
    expected = flash_attention(q, k, v, causal=True)
    for start, stop in ((0, 5), (5, 6), (6, 9)):
        filled = torch.full((2,), start, dtype=torch.int32) if on_device else start
        new = (x[:, start:stop] for x in (q, k, v))
        query, key, value = new
        out = compat.flash_attn_with_kvcache(
            query, keys, values, key, value, cache_seqlens=filled, causal=True
        )
        torch.testing.assert_close(out, expected[:, start:stop])
    assert torch.equal(keys[:, :9], k) and (values[:, 9:] == 1e4).all()


def test_a_padded_batch_is_packed_and_padded_again():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 1]])
    states = normal(3, 3, 4)
    packed, indices, bounds, longest, used = bert_padding.unpad_input(states, mask)
    assert torch.equal(packed, states[mask.bool()]) and longest == 3
    assert bounds.tolist() == [0, 2, 5, 6] and used.tolist() == [2, 3, 1]
    for places in (indices, indices.int()):  # transformers has the latter for single tokens
        padded = bert_padding.pad_input(packed, places, 3, 3)
        assert torch.equal(padded, states * mask[..., None])
        first, residual = bert_padding.index_first_axis_residual(states.flatten(0, 1), places)
        assert torch.equal(first, packed) and torch.equal(residual, states.flatten(0, 1))


def test_rows_of_several_sequences_are_packed():
    """A row of lengths 2 and 1, then padding; and one of a single sequence."""
    states, lengths = normal(2, 4, 3), torch.tensor([[2, 0, 1, 0], [4, 0, 0, 0]])
    packed, indices, bounds, longest = bert_padding.unpad_input_for_concatenated_sequences(
        states, lengths
    )
    assert torch.equal(packed, torch.cat((states[0, :3], states[1]))) and longest == 4
    assert bounds.tolist() == [0, 2, 3, 7] and indices.tolist() == [0, 1, 2, 4, 5, 6, 7]
