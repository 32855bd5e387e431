"""Device dispatch beside host and dense dispatch, its memory, and what its backward pass writes."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

import tossup
from tests.support import poison_memory
from tossup.kernels.routing import MixerTable
from tossup.supernet.config import ModelConfig
from tossup.supernet.device_dispatch import Fork, carve, slot_bytes
from tossup.supernet.evaluate import evaluate_placements
from tossup.supernet.mixers import Attention, Cache, GroupedMamba, Mamba
from tossup.supernet.model import SupernetModel, language_model_losses
from tossup.supernet.optimizer import parameter_groups
from tossup.supernet.stochastic import StochasticMixer

MIXERS = {
    "attention": {"type": "attention", "heads": 4, "kv_heads": 2, "head_dim": 6},
    "window": {"type": "attention", "heads": 2, "window_size": 3, "rope_theta": None},
    "mamba": {"type": "mamba1", "d_state": 4},
}
GROUPS = {"type": "mamba", "d_inner": 16, "d_xb": 8, "state_size": 4, "dt_rank": 3}
GROUPED = {
    "attention": MIXERS["attention"],
    "before": GROUPS,
    "after": GROUPS | {"repeat_kv_before_conv": False, "dt_proj_bias": False, "bias": True},
}
NAN = float("nan")

every_set = pytest.mark.parametrize("mixers", [MIXERS, GROUPED], ids=["mamba1", "grouped"])
interpreted = os.environ.get("TRITON_INTERPRET") == "1"
needs_interpreter = pytest.mark.skipif(not interpreted, reason="tensors are on the CPU")
every_backend = pytest.mark.parametrize(
    "impl", ["cpu", pytest.param("triton", marks=needs_interpreter)]
)


def model_of(dispatch: str, layers: int = 2, mixers: dict = MIXERS) -> SupernetModel:
    torch.manual_seed(0)
    config = ModelConfig.model_validate(
        {
            "vocab_size": 32,
            "hidden_size": 16,
            "num_layers": layers,
            "intermediate_size": 24,
            "initializer_range": 0.2,
            "mixer": {"type": "stochastic", "mixers": mixers, "per_sample": True},
        }
    )
    return SupernetModel(config, dispatch).train()


def table_of(*rows: list[int]) -> MixerTable:
    return MixerTable.of(torch.tensor(rows), mixers=3, batch=4)


TABLES = {
    "every mixer": table_of([0, 1, 2, 2], [2, 0, 1, 0]),
    "one mixer": table_of([2, 2, 2, 2], [0, 0, 0, 0]),
    "two mixers": table_of([1, 0, 1, 0], [2, 2, 1, 2]),
}


def losses_and_gradients(model: SupernetModel, table: MixerTable, seed: int = 1) -> list[Tensor]:
    tokens = torch.randint(32, (4, 21), generator=torch.Generator().manual_seed(seed))
    losses, _ = language_model_losses(model(tokens, table=table), tokens.roll(-1, 1))
    losses.sum().backward()
    grads = [p.grad for p in model.parameters()]
    zeros = [torch.zeros_like(p) for p in model.parameters()]
    return [
        losses.detach(),
        *(z if g is None else g.clone() for g, z in zip(grads, zeros, strict=True)),
    ]


@pytest.mark.parametrize(
    "mixers, table",
    [*((MIXERS, table) for table in TABLES.values()), (GROUPED, table_of([0, 1, 2, 2]))],
    ids=[*TABLES, "grouped"],
)
@every_backend
def test_agrees_with_host_and_dense(impl, mixers, table, monkeypatch):
    layers = len(table.table)
    theirs = [
        losses_and_gradients(model_of(dispatch, layers, mixers), table)
        for dispatch in ("host", "dense")
    ]
    monkeypatch.setenv("TOSSUP_IMPL", impl)
    poison_memory(monkeypatch)
    ours = losses_and_gradients(model_of("device", layers, mixers), table)
    for expected in theirs:
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_micro_batches_with_other_tables_add_up(monkeypatch):
    """The first one overwrites what is there, later ones add to it; an unused mixer's stays."""
    tables = [table_of([0, 0, 0, 2], [2, 2, 2, 2]), table_of([0, 2, 2, 0], [2, 0, 2, 2])]
    host, device = model_of("host"), model_of("device")
    for seed, table in enumerate(tables):
        expected = losses_and_gradients(host, table, seed)[1:]
    names = [name for name, _ in device.named_parameters()]
    for name, parameter in device.named_parameters():
        gated = device.gate_of(name) is not None
        parameter.grad = torch.full_like(parameter, float("nan")) if gated else None
    for block in device.layers:
        block.mixer.written = torch.zeros(3, dtype=torch.int32)
    for seed, table in enumerate(tables):
        ours = losses_and_gradients(device, table, seed)[1:]
    assert [block.mixer.written.tolist() for block in device.layers] == [[3, 0, 2], [1, 0, 4]]
    for name, got, wanted in zip(names, ours, expected, strict=True):
        if ".mixers.window." in name:
            assert got.isnan().all(), name
        else:
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5, msg=name)


def test_gradients_are_forgotten_also_before_the_first_step():
    model, host = model_of("device"), model_of("host")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for name, parameter in model.named_parameters():
        if model.gate_of(name) is None:
            parameter.grad = None
    for block in model.layers:
        block.mixer.forget_gradients()
    results = [losses_and_gradients(m, TABLES["every mixer"]) for m in (model, host)]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_arguments_that_no_mixer_takes_are_let_pass():
    layer = model_of("device", layers=1).layers[0].mixer
    x, table = torch.randn(4, 9, 16), table_of([0, 1, 2, 2])
    with_positions = layer(x, table=table, position_ids=torch.arange(9)[None])
    torch.testing.assert_close(with_positions, layer(x, table=table))


def test_a_frozen_parameter_gets_no_gradient():
    model = model_of("device")
    frozen = {"o_proj.weight", "A_log", "x_proj.weight"}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(name.endswith(part) for part in frozen))
    losses_and_gradients(model, TABLES["every mixer"])
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad), name


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("biases", [(), ("bias",), ("dt_proj_bias", "conv_bias")])
@pytest.mark.parametrize("d_xb", [4, 12, 24])
def test_grouped_mamba_in_each_of_its_forms(before, biases, d_xb):
    """Apriel adds the bias of dt_proj twice, so its gradient comes from two places."""
    torch.manual_seed(0)
    options = {name: name in biases for name in ("bias", "dt_proj_bias", "conv_bias")}
    mixers = {
        "attention": Attention(16, heads=2),
        "mamba": GroupedMamba(16, 24, d_xb, 4, repeat_kv_before_conv=before, **options),
    }
    x, table = torch.randn(4, 7, 16), MixerTable.of(torch.tensor([[0, 1, 1, 0]]), 2, 4)
    results = []
    for dispatch in ("device", "host"):
        layer = StochasticMixer(mixers, dispatch=dispatch)
        leaf = x.clone().requires_grad_()
        out = layer(leaf, table=table)
        out.square().sum().backward()
        results.append([out, leaf.grad, *(p.grad.clone() for p in layer.parameters())])
        layer.zero_grad()
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_a_bias_trains_beside_a_frozen_weight():
    torch.manual_seed(0)
    mixers = {"one": Mamba(16, bias=True), "other": Mamba(16, bias=True)}
    for mixer in mixers.values():
        mixer.in_proj.weight.requires_grad_(False)
    x, table = torch.randn(4, 7, 16), MixerTable.of(torch.tensor([[0, 1, 1, 0]]), 2, 4)
    gradients = []
    for dispatch in ("device", "host"):
        layer = StochasticMixer(mixers, dispatch=dispatch)
        layer(x.requires_grad_(), table=table).square().sum().backward()
        gradients.append([mixer.in_proj.bias.grad.clone() for mixer in mixers.values()])
        assert mixers["one"].in_proj.weight.grad is None
        layer.zero_grad()
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "only, most", [("attention", 1.05), ("mamba", 1.05), ("before", 0.9), ("after", 0.9)]
)
def test_what_a_mixer_keeps_fits_into_a_slot_of_the_largest(only, most):
    """Within 5 % of what autograd itself keeps of that mixer alone, inputs and weights aside.

    Grouped Mamba keeps less: the repeated channels are repeated again.
    """
    torch.manual_seed(0)
    mixers = {
        "attention": Attention(64, 4, kv_heads=2),
        "mamba": Mamba(64, d_state=8),
        "before": GroupedMamba(64, 128, 32, 8),
        "after": GroupedMamba(64, 128, 32, 8, repeat_kv_before_conv=False),
    }
    x = torch.randn(3, 64, 64, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {t.untyped_storage().data_ptr() for t in (x, *mixers[only].parameters())}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mixers[only](x)
    by_autograd = sum(size for place, size in kept.items() if place not in own)
    layout = mixers[only].slot_layout(64, x.dtype, "cpu")
    assert len(x) * slot_bytes(layout) <= most * by_autograd


def test_a_layer_holds_the_largest_mixers_slots_not_the_sum():
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.uint8:
            saved.append(tensor.nbytes)
        return tensor

    model = model_of("device", layers=1)
    tokens = torch.zeros(4, 21, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens, table=table_of([0, 1, 2, 2]))
    layouts = [
        m.slot_layout(21, torch.float32, "cpu") for m in model.layers[0].mixer.mixers.values()
    ]
    assert saved == [4 * max(map(slot_bytes, layouts))]


def test_tensors_of_a_slot_do_not_overlap_and_stay_within_their_sample():
    layout = {"a": ((3, 5), torch.bfloat16), "b": ((7,), torch.float32), "c": ((1,), torch.uint8)}
    slots = torch.zeros(2, slot_bytes(layout), dtype=torch.uint8)
    tensors = carve(slots, layout)
    for value, (name, (shape, dtype)) in enumerate(layout.items(), 1):
        assert tensors[name].shape == (2, *shape) and tensors[name].dtype == dtype
        assert tensors[name].data_ptr() % 16 == slots.data_ptr() % 16
        tensors[name][1].fill_(value)
    assert all((tensors[n][1] == v).all() for v, n in enumerate(layout, 1))
    assert (slots[0] == 0).all()


def test_autocast_computes_in_bfloat16():
    model, table = model_of("device", layers=1), table_of([0, 1, 2, 2])
    hidden = torch.randn(4, 9, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out = model.layers[0].mixer(hidden, table=table)
    exact = model_of("host", layers=1).layers[0].mixer(hidden, table=table)
    assert out.dtype == torch.bfloat16
    assert (out - exact).abs().max() < 0.02 * exact.abs().max()


def test_branches_begin_behind_the_fork_and_end_before_the_join(monkeypatch):
    log: list[str] = []

    class Stream:
        def __init__(self, name: object):
            self.name = str(name)

        def record_event(self) -> str:
            log.append(f"{self.name} records")
            return "start"

        def wait_event(self, event: str) -> None:
            log.append(f"{self.name} waits for {event}")

        def wait_stream(self, other: "Stream") -> None:
            log.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        log.append(f"to {stream.name}")
        yield
        log.append("back")

    names = iter(["side 1", "side 2"])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(next(names)))
    monkeypatch.setattr(torch.cuda, "stream", on)
    fork = Fork(torch.device("cuda", 7), 3)
    for index in range(3):
        with fork.branch(index):
            log.append(f"mixer {index}")
    fork.join()
    assert log == [
        "main records", "mixer 0",
        "side 1 waits for start", "to side 1", "mixer 1", "back",
        "side 2 waits for start", "to side 2", "mixer 2", "back",
        "main waits for side 1", "main waits for side 2",
    ]  # fmt: skip


class TestRefusals:
    def test_mixers_that_follow_no_route(self):
        with pytest.raises(ValueError, match=r"takes mixers that follow a route.* got Linear for"):
            StochasticMixer({"linear": nn.Linear(4, 4)}, dispatch="device")

    def test_mixers_that_share_a_parameter(self):
        one, other = Attention(16, 2), Attention(16, 2)
        other.q_proj = one.q_proj
        with pytest.raises(ValueError, match=r"one\.q_proj.weight and other\.q_proj.weight are"):
            StochasticMixer({"one": one, "other": other}, dispatch="device")
        one.k_proj = one.v_proj
        with pytest.raises(ValueError, match=r"one\.k_proj.weight and one\.v_proj.weight are the"):
            StochasticMixer({"one": one}, dispatch="device")

    def test_a_parameter_shared_between_layers(self):
        model = model_of("device")
        first, second = (block.mixer.mixers["mamba"] for block in model.layers)
        second.D = first.D
        with pytest.raises(ValueError, match=r"one of layer 0 is also in layers\.1\.mixer"):
            parameter_groups(model)
        first.D.requires_grad_(False)
        parameter_groups(model)
        model = nn.ModuleDict({"one": model, "other": nn.ParameterList([first.A_log])})
        with pytest.raises(ValueError, match=r"one of layer 0 is also in other\.0"):
            parameter_groups(model)
        parameter_groups(nn.ModuleDict({"one": model["one"], "again": model["one"]}))

    def test_what_calling_it_would_do_besides(self):
        class Louder(Mamba):
            def forward(self, hidden_states, **kwargs):
                return 2 * super().forward(hidden_states, **kwargs)

        class Blind(Attention):
            def attend(self, q, k, v, **packed):
                return v

        hooked, patched = Mamba(16), Mamba(16)
        hooked.x_proj.register_forward_hook(lambda module, args, out: 2 * out)
        patched.forward = lambda hidden_states: hidden_states
        for mixer, message in (
            (Louder(16), "of their own, got Louder for only"),
            (Blind(16, 2), "of their own, got Blind for only"),
            (torch.compile(Mamba(16)), "of their own, got OptimizedModule for only"),
            (hooked, "may be hooked or patched: only.x_proj is"),
            (patched, "may be hooked or patched: only is"),
        ):
            with pytest.raises(ValueError, match=message):
                StochasticMixer({"only": mixer}, dispatch="device")

    @pytest.mark.parametrize("passes", [0, 1])
    @pytest.mark.parametrize(
        "change, message",
        [
            (lambda m: m.register_forward_hook(lambda *_: None), "hooked or patched: one is"),
            (lambda m: m.x_proj.register_forward_pre_hook(lambda *_: None), r"one\.x_proj is"),
            (lambda m: setattr(m.in_proj, "forward", m.in_proj.forward), r"one\.in_proj is"),
            (lambda m: setattr(m, "out_proj", nn.Sequential(m.out_proj)), "got Sequential for"),
            (lambda m: setattr(m.x_proj, "bias", nn.Parameter(torch.ones(9))), "would ignore"),
        ],
    )
    def test_what_changes_after_it_was_made(self, change, message, passes):
        layer = StochasticMixer({"one": Mamba(16), "other": Mamba(16)}, dispatch="device")
        x, table = torch.randn(2, 5, 16), MixerTable.of(torch.tensor([[0, 1]]), 2, 2)
        for _ in range(passes):
            layer(x, table=table)
        change(layer.mixers["one"])
        with pytest.raises(ValueError, match=message):
            layer(x, table=table)

    def test_a_parameter_that_trains_again_and_is_shared(self):
        layer = StochasticMixer({"one": Mamba(16), "other": Mamba(16)}, dispatch="device")
        one, other = layer.mixers.values()
        other.D = one.D
        one.D.requires_grad_(False)
        x, table = torch.randn(2, 5, 16), MixerTable.of(torch.tensor([[0, 1]]), 2, 2)
        layer(x, table=table)
        one.D.requires_grad_(True)
        with pytest.raises(ValueError, match=r"one\.D and other\.D are the same"):
            layer(x, table=table)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing(self, reentrant):
        gradients = []
        for checkpointed in (False, True):
            model, table = model_of("device", layers=2), table_of([0, 1, 2, 2], [1, 1, 0, 2])
            x = torch.randn(4, 9, 16, requires_grad=True)  # after model_of's seed
            for block in model.layers:
                run = partial(block.mixer, table=table)
                x = x + (checkpoint(run, x, use_reentrant=reentrant) if checkpointed else run(x))
            x.square().sum().backward()
            gradients.append([p.grad for p in model.layers.parameters()])
        for plain, again in zip(*gradients, strict=True):
            assert (plain is None) == (again is None)
            assert plain is None or torch.equal(plain, again)

    def test_parameters_that_change_before_the_backward_pass(self):
        layer, table = model_of("device", layers=1).layers[0].mixer, table_of([0, 1, 2, 2])
        out = layer(torch.randn(4, 9, 16), table=table)
        with torch.no_grad():
            layer.mixers["attention"].o_proj.weight.mul_(3)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
        x = torch.randn(4, 9, 16)
        for copy in (lambda p: p.detach().clone(), lambda p: p.detach()):
            others = {name: copy(p).requires_grad_() for name, p in layer.named_parameters()}
            out = torch.func.functional_call(layer, others, (x,), {"table": table})
            with pytest.raises(RuntimeError, match="was exchanged between its forward and"):
                out.sum().backward()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda mixer: setattr(mixer, "q_proj", nn.Sequential(mixer.q_proj)),
                "as they come from torch, got Sequential for attention.q_proj",
            ),
            (
                lambda mixer: parametrizations.weight_norm(mixer.q_proj),
                "got ParametrizedLinear for attention.q_proj",
            ),
            (
                lambda mixer: setattr(mixer, "o_proj", nn.Linear(16, 16)),
                "would ignore attention.o_proj.bias: Attention has no such",
            ),
        ],
    )
    def test_what_routed_passes_do_not_know_also_where_it_comes_later(self, change, message):
        layer = StochasticMixer({"attention": Attention(16, 2)}, dispatch="device")
        change(layer.mixers["attention"])
        table = MixerTable.of(torch.zeros(1, 4, dtype=torch.int64), 1, 4)
        with pytest.raises(ValueError, match=re.escape(message)):
            layer(torch.zeros(4, 9, 16), table=table)

    def test_a_placement_to_train(self):
        layer = model_of("device", layers=1).layers[0].mixer
        with pytest.raises(ValueError, match=r"pass table= for placement="):
            layer(torch.zeros(4, 9, 16), placement="mamba")

    def test_a_second_derivative(self):
        layer = model_of("device", layers=1).layers[0].mixer
        x = torch.randn(4, 9, 16, requires_grad=True)
        out = layer(x, table=table_of([0, 1, 2, 2]))
        (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()

    def test_a_table_that_leaves_a_sample_out(self):
        layer = model_of("host", layers=1).layers[0].mixer
        with pytest.raises(ValueError, match="gives 3 of the 4 samples of layer 0 a mixer"):
            layer(torch.zeros(4, 9, 16), table=table_of([0, 1, 5, 0]))

    def test_what_mixers_take_and_it_does_not(self):
        layer = model_of("device", layers=1).layers[0].mixer
        angles = torch.zeros(2, 9, 3).unbind()
        cache = Cache(1, 9).layers[0]
        caches = [{"past_key_values": of} for of in (cache, DynamicCache())]  # the latter is empty
        for told in (*caches, {"use_cache": True}, {"angles": angles}):
            name = next(iter(told))
            with pytest.raises(ValueError, match=f"takes no {name} while it follows a table"):
                layer(torch.zeros(4, 9, 16), table=table_of([0, 1, 2, 2]), **told)

    def test_a_table_elsewhere(self):
        layer = model_of("device", layers=1).layers[0].mixer.to("meta")
        with pytest.raises(ValueError, match="must be on meta, as hidden_states are, got cpu"):
            layer(torch.zeros(4, 9, 16, device="meta"), table=table_of([0, 1, 2, 2]))


def test_placements_are_scored_where_the_model_is():
    model = model_of("device").to("meta")
    batch = torch.zeros(2, 9, dtype=torch.int64), torch.zeros(2, 9, dtype=torch.int64)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):  # when it reads scores
        evaluate_placements(model, [batch], [("mamba", "window"), ("window", "mamba")])


def test_an_inference_before_training_changes_nothing():
    model, table = model_of("device"), TABLES["every mixer"]
    with torch.inference_mode():
        model(torch.zeros(4, 9, dtype=torch.int64), table=table)
    after, fresh = (losses_and_gradients(each, table) for each in (model, model_of("device")))
    for ours, expected in zip(after, fresh, strict=True):
        assert torch.equal(ours, expected)


def test_evaluation_takes_the_main_mixer_as_ever():
    device, host = model_of("device").eval(), model_of("host").eval()
    tokens = torch.arange(20).view(2, 10)
    torch.testing.assert_close(device(tokens), host(tokens))


@pytest.mark.parametrize("before", ["nothing", "something", "a step"])
def test_gradients_of_an_evaluation_are_added_to_none_that_were_forgotten(before):
    torch.manual_seed(0)
    layer = StochasticMixer({"a": Mamba(16, 4), "b": Mamba(16, 4)}, dispatch="device")
    x, table = torch.randn(2, 5, 16), MixerTable.of(torch.tensor([[0, 1]]), 2, 2)
    weight = layer.mixers["a"].out_proj.weight
    if before == "a step":
        layer(x, table=table).sum().backward()
    if before == "something":
        weight.grad = torch.full_like(weight, NAN)
    layer.forget_gradients()
    layer.eval()
    layer(x).square().sum().backward()
    (expected,) = torch.autograd.grad(layer(x).square().sum(), weight)
    torch.testing.assert_close(weight.grad, expected)
    layer(x).square().sum().backward()
    torch.testing.assert_close(weight.grad, 2 * expected)
    layer.train()
    layer(x, table=table).sum().backward()  # a step's next micro-batch, which adds
    (more,) = torch.autograd.grad(layer.mixers["a"](x[:1]).sum(), weight)
    torch.testing.assert_close(weight.grad, 2 * expected + more)


def test_a_drop_in_layer_finds_its_angles_itself():
    torch.manual_seed(0)
    mixers = {"attention": Attention(16, 2), "mamba": Mamba(16)}
    strategy = tossup.Strategy(mixers=2, per_sample=True)
    x = torch.randn(5, 7, 16)
    outs = []
    for dispatch in ("device", "host"):
        router = tossup.Router(strategy, layers=1, seed=4)
        layer = StochasticMixer(mixers, router=router, dispatch=dispatch, num_outputs=2)
        router.draw(batch=5)
        outs.append(layer(x)[0])
        outs.append(layer(x, preprocessed={"attention": {}})[0])
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0])
