"""StochasticMixer around any modules: whom it follows, what each mixer sees, what it reports."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tossup import Attention, Mamba, MixerTable, Router, StochasticMixer, Strategy
from tossup.supernet.metrics import Mean


class Scale(nn.Module):
    """Multiplies by its weight, and remembers what it was called with."""

    def __init__(self, weight: float):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.seen = []

    def forward(self, hidden_states, attention_mask=None, flavour="plain"):
        self.seen.append((hidden_states.detach(), attention_mask, flavour))
        return hidden_states * self.weight


class Sent(TorchDispatchMode):
    """Counts what is copied from the CPU to the meta device."""

    def __init__(self):
        super().__init__()
        self.copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_meta:
            self.copies += any(isinstance(x, torch.Tensor) and x.device.type == "cpu" for x in args)
        return out


class Judge(Scale):
    """Adds a loss, and a metric, of each sample's mean."""

    def forward(self, hidden_states, losses, metrics):
        losses["level"] = hidden_states.mean((1, 2)) * self.weight
        metrics["samples"] = torch.ones(len(hidden_states))
        return hidden_states * self.weight


def three(**kwargs):
    return StochasticMixer({"a": Scale(2.0), "b": Scale(3.0), "c": Scale(5.0)}, **kwargs)


def table_of(*rows, batch):
    return MixerTable.of(torch.tensor(rows), mixers=3, batch=batch)


@pytest.mark.parametrize("dispatch", ["host", "dense"])
def test_a_table_is_sent_to_the_device_once(dispatch):
    """Each copy of pageable memory waits for the GPU."""
    layers = [three(layer=layer, dispatch=dispatch).to("meta") for layer in range(3)]
    x, table = torch.empty(5, 3, 4, device="meta"), table_of(*[[0, 1, 2, 1, 0]] * 3, batch=5)
    with Sent() as sent:
        for layer in layers * 2:
            x = layer(x, table=table)
    assert sent.copies == 3  # table, counts and samples


@pytest.mark.parametrize("dispatch", ["host", "dense"])
@pytest.mark.parametrize("row", [[0], [2], [0, 1, 2, 1, 0], [1, 1, 1, 1, 1], [2, 2, 0, 2, 2]])
def test_each_sample_takes_its_mixer(dispatch, row):
    layer = three(layer=1, dispatch=dispatch)
    x = torch.randn(5, 3, 4, requires_grad=True)
    table = table_of([0] * len(row), row, batch=5)
    out = layer(x, table=table)
    factors = torch.tensor([2.0, 3.0, 5.0])[torch.tensor(row)].expand(5)[:, None, None]
    torch.testing.assert_close(out, x * factors)
    dout = torch.randn_like(out)
    dx, *dweights = torch.autograd.grad(
        out, [x, *layer.parameters()], dout, allow_unused=True, materialize_grads=True
    )
    torch.testing.assert_close(dx, dout * factors)
    taken = torch.tensor(row).expand(5)
    for index, dweight in enumerate(dweights):
        torch.testing.assert_close(dweight, (dout * x)[taken == index].sum())


def test_host_dispatch_runs_only_what_was_chosen_on_its_own_samples():
    layer = three()
    x, mask = torch.randn(4, 3, 2), torch.arange(12).view(4, 3)
    layer(x, mask, table=table_of([2, 0, 2, 0], batch=4), flavour="salty", unknown=1)
    a, b, c = layer.mixers.values()
    assert not b.seen
    for mixer, rows in ((a, [1, 3]), (c, [0, 2])):
        ((hidden, seen_mask, flavour),) = mixer.seen
        assert torch.equal(hidden, x[rows]) and torch.equal(seen_mask, mask[rows])
        assert flavour == "salty"


def test_training_follows_the_router_evaluation_the_main_mixer_placement_overrides_both():
    router = Router(Strategy(mixers=3, kind="weighted", weights=(0, 0, 1)), layers=2, seed=3)
    layers = [three(layer=i, router=router, main_mixer_name="b") for i in range(2)]
    x = torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match=r"call the router's draw\(batch\) before each step"):
        layers[0](x)
    router.draw(2)
    for layer in layers:
        torch.testing.assert_close(layer(x), 5 * x)
        torch.testing.assert_close(layer(x, placement="a"), 2 * x)
        layer.eval()
        torch.testing.assert_close(layer(x), 3 * x)
        torch.testing.assert_close(layer(x, placement="a"), 2 * x)
    for layer, factor in zip(layers, (5, 2), strict=True):
        torch.testing.assert_close(layer(x, placement=["c", "a"]), factor * x)


def test_router_repeats_its_tables_from_any_step():
    strategy = Strategy(mixers=3, per_sample=True)
    first, resumed = Router(strategy, 4, seed=7), Router(strategy, 4, seed=7, step=2)
    tables = [first.draw(5).table for _ in range(4)]
    assert torch.equal(resumed.draw(5).table, tables[2])
    assert torch.equal(resumed.draw(5).table, tables[3])
    assert not torch.equal(tables[0], tables[1])
    taken = torch.stack(tables)[..., None] == torch.arange(3)
    assert torch.equal(first.counts, taken.sum((0, 2)))


def test_router_on_a_device_draws_the_same_tables_from_a_counter_there():
    strategy = Strategy(mixers=3, per_sample=True)
    host, device = Router(strategy, 4, seed=7), Router(strategy, 4, seed=7, device="cpu")
    for _ in range(3):
        assert torch.equal(device.draw(5).table, host.draw(5).table)
    assert torch.equal(device.counts, host.counts)
    counter = device.step
    counter.fill_(1)  # what a replayed graph would read
    assert torch.equal(device.draw(5).table, Router(strategy, 4, seed=7, step=1).draw(5).table)
    assert device.step is counter and counter.item() == 2


@pytest.mark.parametrize("dispatch", ["host", "dense"])
def test_keyword_arguments_follow_their_samples(dispatch):
    """Rows go with their sample; one row serves all; what has no rows is left alone."""
    seen = []

    class Mixer(nn.Module):
        def forward(self, hidden_states, position_embeddings, extra, scale):
            seen.append((position_embeddings, extra, scale))
            return hidden_states

    layer = StochasticMixer(
        {"a": Mixer(), "b": Mixer()}, dispatch=dispatch, batched_kwargs={"extra"}
    )
    cos, sin = torch.randn(1, 5, 2), torch.randn(4, 5, 2)
    extra, scale = torch.randn(4, 3), torch.randn(4)
    table = MixerTable.of(torch.tensor([[1, 0, 0, 1]]), 2, 4)
    layer(
        torch.randn(4, 5, 2), table=table, position_embeddings=(cos, sin), extra=extra, scale=scale
    )
    rows = ([1, 2], [0, 3]) if dispatch == "host" else (range(4), range(4))
    for row, ((own_cos, own_sin), own_extra, own_scale) in zip(rows, seen, strict=True):
        assert torch.equal(own_cos, cos) and torch.equal(own_sin, sin[list(row)])
        assert torch.equal(own_extra, extra[list(row)]) and torch.equal(own_scale, scale)
    if dispatch == "host":
        with pytest.raises(ValueError, match=r"extra takes one row, or one for each of the 4 samp"):
            layer(
                torch.randn(4, 5, 2),
                table=table,
                position_embeddings=None,
                extra=torch.randn(7, 3),
                scale=None,
            )


def test_rows_that_are_not_those_of_the_samples_are_refused():
    """One sample's row and another argument's two broadcast, to two rows of who knows what."""

    class Mixer(nn.Module):
        def forward(self, hidden_states, offset):
            return hidden_states + offset

    layer = StochasticMixer({"a": Mixer(), "b": Mixer()})
    table = MixerTable.of(torch.tensor([[1, 0]]), 2, 2)
    x, offset = torch.ones(2, 1, 1), torch.tensor([10.0, 20.0]).view(2, 1, 1)
    with pytest.raises(ValueError, match="mixer a made 2 rows of 1 samples: name arguments"):
        layer(x, table=table, offset=offset)
    told = StochasticMixer({"a": Mixer(), "b": Mixer()}, batched_kwargs={"offset"})
    assert told(x, table=table, offset=offset).flatten().tolist() == [11.0, 21.0]


def test_forwards_get_what_they_take():
    """By name, by **kwargs (only what says something), behind torch.compile; never positionally."""
    seen = {}

    class Named(nn.Module):
        def forward(self, x, /, flavour):
            seen["named"] = flavour
            return x

    class Wrapper(nn.Module):
        def forward(self, *args, **kwargs):
            seen["wrapper"] = kwargs
            return args[0]

    compiled = torch.compile(Scale(2.0), backend="eager")
    layer = StochasticMixer({"named": Named(), "wrapper": Wrapper(), "compiled": compiled})
    x = torch.randn(2, 3, 4)
    for name in layer.names:
        out = layer(x, placement=name, losses={}, x=1, flavour="sour")
    assert seen == {"named": "sour", "wrapper": {"x": 1, "flavour": "sour"}}
    torch.testing.assert_close(out, 2 * x)
    assert compiled._orig_mod.seen[-1][2] == "sour"


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("dispatch, whole", [("host", False), ("dense", True), ("device", False)])
def test_a_layer_compiles(dispatch, whole, warm):
    torch._dynamo.reset()
    torch.manual_seed(0)
    mixers = {"one": Attention(16, 2), "other": Mamba(16)}
    layer = StochasticMixer(mixers, dispatch=dispatch)
    x, table = torch.randn(2, 5, 16), MixerTable.of(torch.tensor([[0, 1]]), 2, 2)
    if warm:
        layer(x, table=table)
    compiled = torch.compile(layer, backend="eager", fullgraph=whole)
    torch.testing.assert_close(compiled(x, table=table), layer(x, table=table))
    layer.eval()
    whole = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(x, placement="other"), layer(x, placement="other"))


def test_what_a_mixer_calls_itself_is_no_argument_of_it():
    class Odd(nn.Module):
        def forward(layer, hidden_states):
            return hidden_states

    layer = StochasticMixer({"odd": Odd()})
    x = torch.randn(2, 3, 4)
    assert torch.equal(layer(x, placement="odd", layer=3), x)


def test_a_layer_survives_pickling_and_copying():
    layer = three(router=Router(Strategy(mixers=3), 1))
    x = torch.randn(2, 3, 4)
    twins = pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)
    for twin in twins:
        assert torch.equal(twin(x, placement="c"), layer(x, placement="c"))
    assert twins[1].router is layer.router  # so that a copy follows the tables that are drawn


@pytest.mark.parametrize("row", [[0, 1, 0], [1, 1, 1]])
def test_dispatches_agree_on_the_dtype_under_autocast(row):
    table = MixerTable.of(torch.tensor([row]), 2, 3)
    outs = []
    for dispatch in ("host", "dense"):
        torch.manual_seed(0)
        layer = StochasticMixer({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}, dispatch=dispatch)
        with torch.autocast("cpu", torch.bfloat16):
            outs.append(layer(torch.ones(3, 2, 4), table=table))
    assert outs[0].dtype == outs[1].dtype == torch.bfloat16
    assert torch.equal(*outs)


@pytest.mark.parametrize("dispatch", ["host", "dense"])
def test_losses_are_means_over_the_samples_that_took_the_mixer(dispatch):
    layers = [
        StochasticMixer(
            {"plain": Scale(2.0), "judge": Judge(3.0), "other": Judge(4.0)},
            layer=i,
            dispatch=dispatch,
        )
        for i in range(2)
    ]
    x = torch.randn(4, 3, 2)
    table = MixerTable.of(torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0]]), 3, 4)
    losses, metrics = {}, {}
    for layer in layers:
        layer(x, table=table, losses=losses, metrics=metrics)
    means = x.mean((1, 2))
    expected = 3 * (means[[0, 2, 3]].sum() + means[1]) / 4
    torch.testing.assert_close(losses["judge/level"].value, expected)
    torch.testing.assert_close(metrics["judge/samples"].value, torch.tensor(1.0))
    assert metrics["judge/samples"].count == 4
    if dispatch == "dense":  # it ran, and nobody took it
        assert losses["other/level"].value == 0
        assert not losses["other/level"].total.isnan()
    else:
        assert "other/level" not in losses


def test_losses_of_a_stochastic_mixer_inside_another():
    inner = StochasticMixer({"plain": Scale(2.0), "judge": Judge(3.0)})
    outer = StochasticMixer({"inner": inner, "plain": Scale(5.0)})
    x, losses = torch.randn(4, 3, 2), {}

    class Place(nn.Module):  # what is inside follows a placement of its own
        def forward(self, hidden_states, losses):
            return inner(hidden_states, placement="judge", losses=losses)

    outer.mixers["inner"] = Place()
    outer(x, table=MixerTable.of(torch.tensor([[0, 1, 0, 0]]), 2, 4), losses=losses)
    expected = 3 * x.mean((1, 2))[[0, 2, 3]].mean()
    torch.testing.assert_close(losses["inner/judge/level"].value, expected)


def test_a_loss_is_one_value_per_sample():
    class Scalar(nn.Module):
        def forward(self, hidden_states, losses):
            losses["level"] = hidden_states.mean()
            return hidden_states

    with pytest.raises(ValueError, match=r"losses of mixer a .* shape \(2,\), got \(\) for level"):
        StochasticMixer({"a": Scalar()})(torch.ones(2, 3, 4), placement="a")


def test_values_of_samples_that_went_elsewhere_do_not_count():
    nan = torch.tensor([1.0, math.nan, 3.0])
    assert Mean.of(nan, torch.tensor([True, False, True])).value == 2
    assert Mean.of(nan, torch.zeros(3, dtype=torch.bool)).value == 0


def test_preprocessing_reaches_its_own_mixer_only():
    layer = three()
    x = torch.randn(2, 3, 4)
    layer(x, placement="a", preprocessed={"a": {"flavour": "sweet"}, "b": {"flavour": "sour"}})
    layer(x, placement="b", preprocessed={"a": {"flavour": "sweet"}, "b": {"flavour": "sour"}})
    layer(x, placement="c", preprocessed={"a": {"flavour": "sweet"}, "b": {"flavour": "sour"}})
    assert [mixer.seen[0][2] for mixer in layer.mixers.values()] == ["sweet", "sour", "plain"]


def test_outputs_come_as_the_caller_expects_them():
    x, cache = torch.randn(2, 3, 4), object()
    assert isinstance(three(num_outputs=1)(x, placement="a"), torch.Tensor)
    assert three(num_outputs=2)(x, placement="a", past_key_values=cache)[1:] == (None,)
    assert three(num_outputs=3)(x, placement="a", past_key_values=cache)[1:] == (None, cache)


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: StochasticMixer({}), "mixers takes at least one mixer, got none"),
        (lambda: three(main_mixer_name="d"), r"main_mixer_name takes .*\['a', 'b', 'c'\], got 'd'"),
        (lambda: three(dispatch="guess"), "dispatch takes device, host or dense, got 'guess'"),
        (
            lambda: three(router=Router(Strategy(mixers=2), 1)),
            "router draws among 2 mixers, got 3 of them",
        ),
        (lambda: three(layer=-1), "layer takes a row of the table, got -1"),
        (lambda: three(router=Router(Strategy(3), layers=4)), "layer takes 0 to 3, got none"),
        (
            lambda: three(layer=2)(torch.zeros(1, 1, 1), placement=["a", "b"]),
            "placement takes a name, or one for each layer, got 2, none for layer 2",
        ),
        (lambda: three(layer=2, router=Router(Strategy(mixers=3), 2)), "takes 0 to 1, got 2"),
        (lambda: three(num_outputs=4), "num_outputs takes 1, 2 or 3, got 4"),
        (lambda: StochasticMixer({"a.b": Scale(1.0)}), "got 'a.b'"),
        (lambda: three()(torch.zeros(1, 1, 1), placement="d"), "placement takes .* got 'd'"),
        (
            lambda: three()(torch.zeros(3, 1, 1), table=table_of([0, 1], batch=2)),
            r"table is for 1 layers, 3 mixers and 2 samples, got layer 0, .* batch of 3",
        ),
        (
            lambda: three()(
                torch.zeros(2, 1, 1), past_key_values=1, table=table_of([0, 1], batch=2)
            ),
            "a cache cannot be shared among mixers",
        ),
    ],
)
def test_misuse_gets_one_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
