import copy
import io
import math
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode

from tests.supernet.host_reads import RefuseHostReads
from tossup import Mamba, MixerTable, StochasticMixer
from tossup.supernet.optimizer import (
    GatedAdamW,
    clip_grad_norm_,
    forget_gradients,
    parameter_groups,
)

LAYERS, MIXERS, STEPS = 3, 2, 30
GATES = [None, *((layer, mixer) for layer in range(LAYERS) for mixer in range(MIXERS))]
OPTIONS = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
NAN = float("nan")


def make_params(dtype=torch.float32, seed=0):
    """Two parameters for every gate, and two shared ones under None; odd shapes."""
    torch.manual_seed(seed)
    return {
        gate: [
            torch.nn.Parameter(torch.randn(5, 7, dtype=dtype)),
            torch.nn.Parameter(torch.randn(3, dtype=dtype)),
        ]
        for gate in GATES
    }


def groups_of(params):
    return [{"params": tensors, "gate": gate} for gate, tensors in params.items()]


def everything(params):
    return [param for tensors in params.values() for param in tensors]


def random_used(generator, probability):
    return torch.rand(LAYERS, MIXERS, generator=generator) < probability


def set_gradients(params, step):
    generator = torch.Generator().manual_seed(1000 + step)
    for param in everything(params):
        param.grad = torch.randn(param.shape, generator=generator, dtype=param.dtype)


def poison_unused(params, used):
    """What unused mixers' gradients hold on a device where nobody wrote them."""
    for gate, tensors in params.items():
        if gate is not None and not used[gate]:
            for param in tensors:
                param.grad = torch.full_like(param, NAN)


def is_used(gate, used):
    return gate is None or bool(used[gate])


def schedule(step):
    return OPTIONS["lr"] * 0.5 * (1 + math.cos(math.pi * step / STEPS))


def adamw_in_float64(param, moments, grad, lr, count):
    """Loshchilov and Hutter (2019), algorithm 2, with the learning rate as schedule multiplier."""
    beta1, beta2 = OPTIONS["betas"]
    first, second = moments
    first.mul_(beta1).add_((1 - beta1) * grad)
    second.mul_(beta2).add_((1 - beta2) * grad**2)
    corrected = first / (1 - beta1**count)
    scale = (second / (1 - beta2**count)).sqrt() + OPTIONS["eps"]
    return param - lr * (corrected / scale + OPTIONS["weight_decay"] * param)


@pytest.mark.parametrize("unused_gradients", ["nan", "none"])
@pytest.mark.parametrize("probability", [0.15, 0.5, 0.9])
def test_skip_is_one_adamw_per_mixer_stepped_when_used(probability, unused_gradients):
    params, oracle = make_params(), make_params()
    optimizer = GatedAdamW(groups_of(params), **OPTIONS)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: schedule(s) / OPTIONS["lr"])
    oracles = {gate: AdamW(tensors, **OPTIONS, fused=True) for gate, tensors in oracle.items()}
    generator = torch.Generator().manual_seed(7)
    steps = dict.fromkeys(GATES, 0)
    for step in range(STEPS):
        used = random_used(generator, probability)
        set_gradients(params, step)
        set_gradients(oracle, step)
        poison_unused(params, used)
        if unused_gradients == "none":
            for param in everything(params):
                param.grad = None if param.grad.isnan().any() else param.grad
        optimizer.step(used=used)
        for gate, plain in oracles.items():
            if is_used(gate, used):
                plain.param_groups[0]["lr"] = scheduler.get_last_lr()[0]
                plain.step()
                steps[gate] += 1
        scheduler.step()
    assert len(set(steps.values())) > 1
    for gate, tensors in params.items():
        for ours, theirs in zip(tensors, oracle[gate], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
            assert optimizer.state[ours]["step"] == steps[gate]
            if steps[gate]:
                for name in ("exp_avg", "exp_avg_sq"):
                    expected = oracles[gate].state[theirs][name]
                    torch.testing.assert_close(
                        optimizer.state[ours][name], expected, rtol=0, atol=0
                    )


def test_skip_is_the_paper_s_algorithm():
    params = make_params(torch.float64)
    optimizer = GatedAdamW(groups_of(params), **OPTIONS)
    expected = {param: param.detach().clone() for param in everything(params)}
    moments = {p: (torch.zeros_like(p.data), torch.zeros_like(p.data)) for p in expected}
    counts = dict.fromkeys(GATES, 0)
    generator = torch.Generator().manual_seed(3)
    for step in range(STEPS):
        used = random_used(generator, 0.5)
        set_gradients(params, step)
        for gate, tensors in params.items():
            if is_used(gate, used):
                counts[gate] += 1
                for p in tensors:
                    expected[p] = adamw_in_float64(
                        expected[p], moments[p], p.grad, OPTIONS["lr"], counts[gate]
                    )
        poison_unused(params, used)
        optimizer.step(used=used)
    for param, value in expected.items():
        torch.testing.assert_close(param.data, value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_unused_mixer_keeps_every_bit(dtype):
    params = make_params(dtype)
    optimizer = GatedAdamW(groups_of(params), **OPTIONS | {"lr": 0.1})  # beyond bfloat16's rounding
    set_gradients(params, 0)
    optimizer.step(used=torch.ones(LAYERS, MIXERS, dtype=torch.int32))
    before = copy.deepcopy(optimizer.state_dict()["state"]), copy.deepcopy(params)
    used = torch.zeros(LAYERS, MIXERS, dtype=torch.int32)
    used[1, 0] = 5  # a count, not a flag
    set_gradients(params, 1)
    poison_unused(params, used)
    optimizer.step(used=used)
    number = 0
    for gate, tensors in params.items():
        for now, then in zip(tensors, before[1][gate], strict=True):
            assert torch.equal(now, then) != is_used(gate, used)
            assert optimizer.state[now]["step"] == 1 + is_used(gate, used)
            for name, value in optimizer.state[now].items():
                assert torch.equal(value, before[0][number][name]) != is_used(gate, used), name
            number += 1


@pytest.mark.parametrize("unused_gradients", ["nan", "none"])
def test_decay_is_adamw_fed_zero_gradients(unused_gradients):
    params, oracle = make_params(), make_params()
    optimizer = GatedAdamW(groups_of(params), **OPTIONS, inactive="decay")
    plain = AdamW(everything(oracle), **OPTIONS, fused=True)
    generator = torch.Generator().manual_seed(11)
    for step in range(STEPS):
        used = random_used(generator, 0.4)
        set_gradients(params, step)
        set_gradients(oracle, step)
        for gate, tensors in oracle.items():
            if not is_used(gate, used):
                for param, twin in zip(params[gate], tensors, strict=True):
                    param.grad = torch.full_like(param, NAN) if unused_gradients == "nan" else None
                    twin.grad = torch.zeros_like(twin)
        rate = schedule(step)
        for group in (*optimizer.param_groups, *plain.param_groups):
            group["lr"] = rate
        optimizer.step(used=used)
        plain.step()
    for ours, theirs in zip(everything(params), everything(oracle), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        for name, value in plain.state[theirs].items():
            torch.testing.assert_close(optimizer.state[ours][name], value, rtol=0, atol=0)


def test_shared_parameters_without_a_gradient_are_passed_over_under_decay_too():
    lonely = torch.nn.Parameter(torch.ones(4))
    optimizer = GatedAdamW([lonely], inactive="decay")
    optimizer.step()
    assert torch.equal(lonely, torch.ones(4))
    assert optimizer.state[lonely]["step"] == 0


def test_groups_have_their_own_options_and_dtypes():
    """Weight decay of one group does not reach another, though both are of one gate."""
    params, oracle = make_params(), make_params()
    for tensors in (params, oracle):
        tensors[0, 1][1].data = tensors[0, 1][1].data.double()
    groups, plain = [], []
    for gate in GATES:
        for index, decay in ((0, 0.3), (1, 0.0)):
            group = {"params": [params[gate][index]], "gate": gate, "weight_decay": decay}
            groups.append(group)
            plain.append({"params": [oracle[gate][index]], "weight_decay": decay})
    groups[2:4] = [{"params": params[0, 0], "gate": (0, 0), "weight_decay": 0.3}]
    plain[2:4] = [{"params": oracle[0, 0], "weight_decay": 0.3}]
    optimizer, reference = GatedAdamW(groups, **OPTIONS), AdamW(plain, **OPTIONS, fused=True)
    for step in range(5):
        set_gradients(params, step)
        set_gradients(oracle, step)
        optimizer.step(used=torch.ones(LAYERS, MIXERS))
        reference.step()
    for ours, theirs in zip(everything(params), everything(oracle), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_groups_may_part_and_meet_again():
    """Options, of which launches are made, change from step to step, also on the device."""
    params, oracle = make_params(), make_params()
    optimizer = GatedAdamW(groups_of(params), **OPTIONS)
    reference = AdamW([{"params": tensors} for tensors in oracle.values()], **OPTIONS, fused=True)
    device = torch.tensor(0.02)
    for step, rates in enumerate([(0.1, 0.1), (0.1, 0.2), (0.3, 0.2), (0.2, 0.2), (0.1, device)]):
        for on_host, (groups, tensors) in enumerate(
            ((optimizer.param_groups, params), (reference.param_groups, oracle))
        ):
            set_gradients(tensors, step)
            for place, group in enumerate(groups):
                lr = rates[place % 2]
                group["lr"] = lr.item() if on_host and lr is device else lr
                group["betas"] = (0.8, 0.9) if place == step else OPTIONS["betas"]
        optimizer.step(used=torch.ones(LAYERS, MIXERS))
        reference.step()
    for ours, theirs in zip(everything(params), everything(oracle), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_two_dtypes_in_one_group():
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(3, dtype=t)) for t in (torch.float32, torch.float64)]
    alone = [torch.nn.Parameter(param.detach().clone()) for param in params]
    optimizer = GatedAdamW([{"params": params, "gate": (0, 0)}], **OPTIONS)
    oracles = [GatedAdamW([param], **OPTIONS) for param in alone]
    for param in (*params, *alone):
        param.grad = torch.ones_like(param)
    optimizer.step(used=torch.ones(1, 1))
    for param, twin, oracle in zip(params, alone, oracles, strict=True):
        oracle.step()
        assert torch.equal(param, twin)


def test_a_tensor_learning_rate_is_read_at_every_step():
    params, twins = make_params(), make_params()
    rate = torch.tensor(0.0)
    optimizer = GatedAdamW(groups_of(params), **{**OPTIONS, "lr": rate})
    plain = GatedAdamW(groups_of(twins), **OPTIONS)
    used = torch.ones(LAYERS, MIXERS)
    for step in range(4):
        rate.fill_(2.0**-step / 64)  # a float32 that the double holds exactly
        for group in plain.param_groups:
            group["lr"] = 2.0**-step / 64
        for tensors, stepped in ((params, optimizer), (twins, plain)):
            set_gradients(tensors, step)
            stepped.step(used=used)
    for ours, theirs in zip(everything(params), everything(twins), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("inactive", ["skip", "decay"])
def test_resuming_continues_bit_for_bit(inactive):
    def run(params, optimizer, steps):
        for step in steps:
            used = random_used(torch.Generator().manual_seed(step), 0.5)
            set_gradients(params, step)
            clip_grad_norm_(optimizer, 1.0, used)
            optimizer.step(used=used)

    straight = make_params()
    whole = GatedAdamW(groups_of(straight), **OPTIONS, inactive=inactive)
    run(straight, whole, range(12))

    params = make_params()
    optimizer = GatedAdamW(groups_of(params), **OPTIONS, inactive=inactive)
    run(params, optimizer, range(5))
    file = io.BytesIO()
    torch.save((params, optimizer.state_dict()), file)
    file.seek(0)
    resumed, state = torch.load(file, weights_only=False)
    again = GatedAdamW(groups_of(resumed), lr=1.0, inactive="skip")
    set_gradients(resumed, 99)
    again.step(used=torch.zeros(LAYERS, MIXERS))  # so that a stale grouping would show
    resumed_values = zip(everything(resumed), everything(params), strict=True)
    for param, value in resumed_values:
        param.data.copy_(value.data)
    again.load_state_dict(state)
    run(resumed, again, range(5, 12))
    for ours, theirs in zip(everything(resumed), everything(straight), strict=True):
        assert torch.equal(ours, theirs)
        for name, value in whole.state[theirs].items():
            assert torch.equal(again.state[ours][name], value)


def test_a_copied_optimizer_steps_its_own_parameters():
    params = make_params()
    optimizer = GatedAdamW(groups_of(params), **OPTIONS)
    set_gradients(params, 0)
    optimizer.step(used=torch.ones(LAYERS, MIXERS))
    before = copy.deepcopy(params)
    copied = copy.deepcopy(optimizer)
    for param in (p for group in copied.param_groups for p in group["params"]):
        param.grad = torch.ones_like(param)
    copied.step(used=torch.ones(LAYERS, MIXERS))
    for ours, theirs in zip(everything(params), everything(before), strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(copied.param_groups[0]["params"][0], before[None][0])


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_sees_the_used_subset_only(max_norm):
    params, oracle = make_params(torch.float64), make_params(torch.float64)
    used = torch.tensor([[1, 0], [0, 2], [0, 0]])
    set_gradients(params, 0)
    set_gradients(oracle, 0)
    poison_unused(params, used)
    subset = [p for gate in GATES if is_used(gate, used) for p in oracle[gate]]
    expected = torch.nn.utils.clip_grad_norm_(subset, max_norm)
    norm = clip_grad_norm_(GatedAdamW(groups_of(params)), max_norm, used)
    torch.testing.assert_close(norm, expected, rtol=1e-12, atol=0)
    for gate in GATES:
        if is_used(gate, used):
            for ours, theirs in zip(params[gate], oracle[gate], strict=True):
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=0)


def test_clipping_takes_groups_of_several_dtypes():
    params = make_params()
    params[None] = [torch.nn.Parameter(p.detach().double()) for p in params[None]]
    params[0, 1] = [torch.nn.Parameter(p.detach().bfloat16()) for p in params[0, 1]]
    used = torch.tensor([[0, 1], [1, 0], [0, 0]])
    set_gradients(params, 0)
    subset = [param.grad for gate in GATES if is_used(gate, used) for param in params[gate]]
    expected = torch.cat([gradient.double().flatten() for gradient in subset]).norm()
    poison_unused(params, used)
    norm = clip_grad_norm_(GatedAdamW(groups_of(params)), 1.0, used)
    torch.testing.assert_close(norm.double(), expected, rtol=1e-3, atol=0)
    clipped = torch.cat([gradient.double().flatten() for gradient in subset]).norm()
    torch.testing.assert_close(clipped, torch.ones_like(clipped), rtol=2e-3, atol=0)


def test_clipping_takes_plain_groups_and_missing_gradients():
    params = make_params()
    for param in params[None]:
        param.grad = torch.ones_like(param)
    elements = sum(param.numel() for param in params[None])
    norm = clip_grad_norm_([{"params": params[None]}], 1.0)
    torch.testing.assert_close(norm, torch.tensor(float(elements)).sqrt())
    norm = clip_grad_norm_(groups_of(params), 1.0, torch.ones(LAYERS, MIXERS))
    torch.testing.assert_close(norm, torch.tensor(1.0), rtol=1e-5, atol=0)


def test_clipping_keeps_a_used_mixer_s_nan():
    params = make_params()
    set_gradients(params, 0)
    params[2, 1][0].grad[0, 0] = NAN
    assert clip_grad_norm_(groups_of(params), 1.0, torch.ones(LAYERS, MIXERS)).isnan()


@pytest.mark.parametrize("mode", [FakeTensorMode, RefuseHostReads])
@pytest.mark.parametrize("inactive", ["skip", "decay"])
def test_a_step_reads_nothing_on_the_host(mode, inactive):
    with FakeTensorMode() if mode is FakeTensorMode else nullcontext():
        params = make_params()
        optimizer = GatedAdamW(groups_of(params), lr=torch.full((), 1e-3), inactive=inactive)
        for param in everything(params):
            param.grad = torch.ones_like(param)
        used = torch.ones(LAYERS, MIXERS, dtype=torch.int32)
        optimizer.buckets()  # what the first step makes, from numbers of the host
        with nullcontext() if mode is FakeTensorMode else mode():
            for _ in range(2):
                clip_grad_norm_(optimizer, 1.0, used)
                optimizer.step(used=used)


class Calls(TorchDispatchMode):
    """Counts the ops that write, which are launches on a GPU: views are not."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("aten", "tossup") and not func.is_view:
            self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_more_gates_cost_no_more_launches():
    params = make_params()
    set_gradients(params, 0)
    counts = []
    for gates in (GATES[:3], GATES):
        optimizer = GatedAdamW(groups_of({gate: params[gate] for gate in gates}))
        with Calls() as calls:
            clip_grad_norm_(optimizer, 1.0, torch.ones(LAYERS, MIXERS))
            optimizer.step(used=torch.ones(LAYERS, MIXERS))
        assert calls.names["adamw"] == 1
        counts.append(calls.names)
    assert counts[0] == counts[1]


def test_state_exists_before_the_first_step():
    params = make_params()
    optimizer = GatedAdamW(groups_of(params))
    addresses = {p: optimizer.state[p]["exp_avg"].data_ptr() for p in everything(params)}
    set_gradients(params, 0)
    optimizer.step(used=torch.ones(LAYERS, MIXERS))
    for param, address in addresses.items():
        assert optimizer.state[param]["exp_avg"].data_ptr() == address


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"lr is -1.0, it takes"),
        ({"lr": torch.ones(2)}, r"lr has shape \(2,\), it takes"),
        ({"betas": (0.9, 1.0)}, r"betas are \(0.9, 1.0\), both take"),
        ({"eps": -1e-8}, r"eps is -1e-08, it takes"),
        ({"weight_decay": -0.1}, r"weight_decay is -0.1, it takes"),
        ({"inactive": "freeze"}, r"inactive is 'freeze', it takes 'skip' or 'decay'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        GatedAdamW([torch.nn.Parameter(torch.ones(1))], **options)


@pytest.mark.parametrize("gate", [(0,), (0, -1), (0, "mamba")])
def test_wrong_gates(gate):
    with pytest.raises(ValueError, match=r"gate is .*, it takes None or a \(layer, mixer\) pair"):
        GatedAdamW([{"params": [torch.nn.Parameter(torch.ones(1))], "gate": gate}])


def test_wrong_used():
    optimizer = GatedAdamW(groups_of(make_params()))
    step = lambda used: optimizer.step(used=used)  # noqa: E731
    for call in (step, lambda used: clip_grad_norm_(optimizer, 1.0, used)):
        with pytest.raises(ValueError, match="used is None, but parameters have gates"):
            call(None)
        with pytest.raises(
            ValueError, match=r"used has shape \(2, 2\), but the gates need \(3, 2\)"
        ):
            call(torch.ones(2, 2))
        with pytest.raises(ValueError, match="used is on meta, but gated parameters are on cpu"):
            call(torch.ones(LAYERS, MIXERS, device="meta"))


def test_state_goes_to_and_from_torchs_adamw():
    def trained(make, state=None):
        model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
        with torch.no_grad():
            for n, parameter in enumerate(model.parameters()):
                parameter.copy_(torch.linspace(-1, n, parameter.numel()).view_as(parameter))
        optimizer = make(model.parameters(), lr=0.1, betas=(0.8, 0.9), weight_decay=0.2)
        if state is not None:
            optimizer.load_state_dict(state)
        (model[0] if state is None else model)(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
        return optimizer, [parameter.detach() for parameter in model.parameters()]

    for makes in ((torch.optim.AdamW, GatedAdamW), (GatedAdamW, torch.optim.AdamW)):
        results = []
        for second in makes:
            first, _ = trained(makes[0])  # the second layer has no gradient yet
            optimizer, weights = trained(second, first.state_dict())
            again, _ = trained(makes[0], optimizer.state_dict())
            results.append([*weights, *(again.state[p]["step"] for p in again.state)])
        torch.testing.assert_close(*results)


def test_options_that_a_state_does_not_have_stay():
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = GatedAdamW([{"params": [parameter], "inactive": "decay", "name": "mine"}])
    optimizer.load_state_dict(torch.optim.AdamW([parameter], lr=0.25).state_dict())
    (group,) = optimizer.param_groups
    assert (group["inactive"], group["name"], group["lr"]) == ("decay", "mine", 0.25)
    with pytest.raises(ValueError, match="state_dict is Adam's"):
        optimizer.load_state_dict(torch.optim.Adam([parameter]).state_dict())


@pytest.mark.parametrize("option", ["amsgrad", "maximize"])
def test_state_of_other_options_is_refused(option):
    state = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], **{option: True}).state_dict()
    with pytest.raises(ValueError, match=f"state_dict has {option}, which this optimizer has not"):
        GatedAdamW([torch.nn.Parameter(torch.ones(1))]).load_state_dict(state)


def test_state_of_other_gates_is_refused():
    params = make_params()
    state = GatedAdamW(groups_of(params)).state_dict()
    swapped = dict(zip(GATES, [*everything(params)][::2], strict=True))
    other = [{"params": [p], "gate": gate} for gate, p in reversed(swapped.items())]
    with pytest.raises(ValueError, match="state_dict has parameter groups with gates"):
        GatedAdamW(other).load_state_dict(state)


def test_stacks_of_matrices_decay_and_taps_do_not():
    model = torch.nn.ModuleDict(
        {"conv1": torch.nn.Conv1d(4, 4, 3), "conv2": torch.nn.Conv2d(1, 2, 3)}
    )
    model["3"] = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv1d(2, 6, 5))
    model["experts"] = torch.nn.ParameterList([torch.randn(3, 4, 5)])
    model["positions"] = torch.nn.ParameterList([torch.randn(1, 7, 2)])
    groups = parameter_groups(model, weight_decay=0.3)
    found = {p.shape: g["weight_decay"] for g in groups for p in g["params"]}
    assert found.pop((3, 4, 5)) == 0.3
    assert set(found.values()) == {0.0}


def test_groups_put_each_mixers_parameters_behind_its_gate():
    """In a model of someone else's; what two mixers share, and what is frozen, is nobody's."""
    shared = torch.nn.Linear(8, 8)
    model = torch.nn.Sequential(torch.nn.Embedding(5, 8), torch.nn.LayerNorm(8))
    for layer in range(2):
        mixers = {"mamba": Mamba(8), "linear": torch.nn.Sequential(torch.nn.Linear(8, 8), shared)}
        model.append(StochasticMixer(mixers, layer=layer))
    model.append(torch.nn.Linear(8, 5))
    model[0].weight._no_weight_decay = True
    model[2].mixers["linear"][0].bias.requires_grad_(False)

    groups = parameter_groups(model, weight_decay=0.3)
    found = {p: (g["gate"], g["weight_decay"]) for g in groups for p in g["params"]}
    expected = {}
    for name, parameter in model.named_parameters():
        place, *_ = name.split(".")
        gate = None
        if ".mixers." in name and parameter is not shared.weight and parameter is not shared.bias:
            gate = (int(place) - 2, 0 if ".mamba." in name else 1)
        undecayed = name.endswith(("bias", "A_log", ".D", "conv1d.weight")) or name[0] in "01"
        if parameter.requires_grad:
            expected[parameter] = (gate, 0.0 if undecayed else 0.3)
    assert found == expected
    GatedAdamW(groups).step(used=torch.ones(2, 2))

    optimizer = GatedAdamW(parameter_groups(model), 0.5, weight_decay=0.2)
    found = {p: (g["gate"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert found == {p: (gate, 0.2 if decay else 0.0) for p, (gate, decay) in expected.items()}
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}


def test_defaults_are_those_of_the_docstring():
    (group,) = GatedAdamW([torch.nn.Parameter(torch.ones(1))]).param_groups
    known = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
    assert known == {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def test_layers_of_one_number_are_refused():
    """As where `layer=` was forgotten: all would follow the first row, behind the same gates."""
    layers = [StochasticMixer({"mamba": Mamba(8), "other": torch.nn.Linear(8, 8)}) for _ in "ab"]
    message = "layer takes a number of its own in every StochasticMixer, got 0 in 0 and in 1"
    with pytest.raises(ValueError, match=message):
        parameter_groups(torch.nn.Sequential(*layers))


def test_forgetting_gradients_trains_as_clearing_them_does():
    """In a layer under device dispatch beside one under host dispatch; the first keeps memory."""
    results = []
    for dispatch in ("device", "host"):
        torch.manual_seed(0)
        layers = [
            StochasticMixer({"one": Mamba(8), "two": Mamba(8)}, layer=layer, dispatch=kind)
            for layer, kind in enumerate((dispatch, "host"))
        ]
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), *layers)
        optimizer = GatedAdamW(parameter_groups(model), lr=1e-2)
        addresses = []
        for step in range(4):
            table = MixerTable.of(torch.tensor([[step % 2], [1]]), 2, 3)
            x = model[0](torch.randn(3, 5, 8))
            for layer in layers:
                x = layer(x, table=table)
            x.square().sum().backward()
            optimizer.step(used=table.count)
            if dispatch == "host":
                optimizer.zero_grad()
                continue
            forget_gradients(model, optimizer)
            routed = list(layers[0].mixers.parameters())
            addresses.append([p.grad.data_ptr() for p in routed])
            assert all(p.grad is None for p in set(model.parameters()) - set(routed))
        assert all(found == addresses[0] for found in addresses)
        results.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*results)
