"""One step of AdamW over many tensors, the norm of their gradients, and clipping by it."""

import math

import pytest
import torch
from torch import Tensor

from tests.support import EXACT, assert_within_budget, every_impl, only_triton, seeded
from tossup.kernels.adamw import Bucket, adamw_, gradient_norm, scale_gradients_
from tossup.kernels.adamw.bucket import CHUNK

# Less than a block, whole chunks, chunks and a rest, a layout of its own, one number, nothing
SHAPES = [(5, 7), (2, CHUNK), (3, 7001), (64, 33), (1,), (0, 4), (1030,)]
GATES = [None, (0, 1), (1, 0), (1, 1), (0, 1), None, (2, 0)]
USED = [[0, 3], [1, 0], [0, 9]]  # the mixers of the last layer's gate and of (1, 1) are not
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.3}
NAN = float("nan")

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])


def make(dtype: torch.dtype, skip: int = 0) -> tuple[Bucket, list[Tensor]]:
    """A bucket amid training, and gradients. skip: elements past a multiple of 16 bytes."""
    random, device = seeded(0), torch.get_default_device()

    def tensors(scale: float, least: float = -math.inf) -> list[Tensor]:
        made = []
        for shape in SHAPES:
            values = (scale * torch.randn(shape, generator=random)).clamp(min=least).to(dtype)
            x = torch.empty(values.numel() + skip, dtype=dtype)[skip:].view(shape)
            x = x.t().contiguous().t() if shape == (64, 33) else x
            made.append(x.copy_(values))
        return made

    steps = [torch.tensor(float(place), device=device) for place in range(len(SHAPES))]
    params, exp_avgs, exp_avg_sqs = tensors(1), tensors(0.1), tensors(0.1, least=1e-4)
    return Bucket(params, GATES, exp_avgs, exp_avg_sqs, steps), tensors(1)


def used_of(rows=USED) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def is_used(gate) -> bool:
    return gate is None or USED[gate[0]][gate[1]] > 0


def state_of(bucket: Bucket) -> list[Tensor]:
    return [*bucket.params, *bucket.exp_avgs, *bucket.exp_avg_sqs]


def by_torch(bucket: Bucket, gradients: list[Tensor | None], inactive: str) -> list[Tensor]:
    """torch.optim's own AdamW, one parameter at a time, in the dtype of the bucket."""
    results = []
    for place, (param, gate) in enumerate(zip(bucket.params, bucket.gates, strict=True)):
        leaf = torch.nn.Parameter(param.clone())
        optimizer = torch.optim.AdamW([leaf], **OPTIONS, foreach=False)
        state = {
            "step": bucket.steps[place].clone(),
            "exp_avg": bucket.exp_avgs[place].clone(),
            "exp_avg_sq": bucket.exp_avg_sqs[place].clone(),
        }
        optimizer.state[leaf] = state
        leaf.grad = gradients[place] if is_used(gate) else None
        if leaf.grad is None and gate is not None and inactive == "decay":
            leaf.grad = torch.zeros_like(leaf)
        optimizer.step()
        results.append((leaf.detach(), state["exp_avg"], state["exp_avg_sq"], state["step"]))
    params, exp_avgs, exp_avg_sqs, steps = zip(*results, strict=True)
    return [*params, *exp_avgs, *exp_avg_sqs, torch.stack(steps)]


def in_float64(bucket: Bucket) -> Bucket:
    columns = (bucket.params, bucket.exp_avgs, bucket.exp_avg_sqs)
    params, *moments = ([x.double() for x in column] for column in columns)
    return Bucket(params, bucket.gates, *moments, [step.clone() for step in bucket.steps])


def without_empty(tensors: list[Tensor]) -> list[Tensor]:
    return [x for x in tensors if x.numel()]


@pytest.mark.parametrize("skip", [0, 1], ids=["aligned", "anywhere"])
@pytest.mark.parametrize("inactive", ["skip", "decay"])
@every_dtype
@every_impl
def test_a_step_is_torch_s_of_what_was_used(impl, dtype, inactive, skip):
    bucket, gradients = make(dtype, skip)
    gradients[1] = None  # used, but nothing came of it
    gradients[0] = None
    exact = by_torch(
        in_float64(bucket), [g if g is None else g.double() for g in gradients], inactive
    )
    rough = by_torch(bucket, gradients, inactive)
    for place, gate in enumerate(GATES):
        if not is_used(gate):
            gradients[place] = None if place == 3 else torch.full_like(bucket.params[place], NAN)
    adamw_(bucket, gradients, used_of(), **OPTIONS, inactive=inactive, impl=impl)
    assert torch.equal(torch.stack(bucket.steps), exact[-1])
    assert_within_budget(*map(without_empty, (state_of(bucket), exact[:-1], rough[:-1])))


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_parameters_with_gaps_are_updated_and_their_gaps_are_not(impl):
    wide = [torch.randn(5, 8, generator=seeded(n)).abs() for n in range(4)]
    before = [x.clone() for x in wide]
    parts = [x[:, :3] for x in wide]
    dense = [x.contiguous() for x in parts]
    for param, exp_avg, exp_avg_sq, gradient in (parts, dense):
        bucket = Bucket([param], None, [exp_avg], [exp_avg_sq], [torch.zeros(())])
        adamw_(bucket, [gradient], **OPTIONS, impl=impl)
    for x, part, alone, then in zip(wide, parts, dense, before, strict=True):
        torch.testing.assert_close(part, alone)
        assert torch.equal(x[:, 3:], then[:, 3:])
    assert not torch.equal(parts[0], before[0][:, :3])


@every_impl
def test_a_bucket_without_elements_counts_its_steps(impl):
    empty = [torch.empty(0, 3) for _ in range(4)]
    bucket = Bucket(empty[:1], None, empty[1:2], empty[2:3], [torch.tensor(4.0)])
    adamw_(bucket, empty[3:], impl=impl)
    adamw_(bucket, [None], impl=impl)
    assert bucket.steps[0] == 5


def test_other_words_for_inactive_are_refused():
    bucket, gradients = make(torch.float32)
    with pytest.raises(ValueError, match="inactive takes skip or decay, got 'decays'"):
        adamw_(bucket, gradients, used_of(), inactive="decays")


@every_dtype
@every_impl
def test_what_was_not_used_keeps_every_bit(impl, dtype):
    bucket, gradients = make(dtype)
    before = [x.clone() for x in state_of(bucket)], [step.clone() for step in bucket.steps]
    for place, gate in enumerate(GATES):
        if not is_used(gate):
            gradients[place].fill_(NAN)
    adamw_(bucket, gradients, used_of(), **OPTIONS | {"lr": 0.5}, impl=impl)  # beyond rounding
    pairs = list(zip(state_of(bucket), before[0], strict=True))
    for place, gate in enumerate(GATES):
        for now, then in pairs[place :: len(GATES)]:
            assert now.numel() == 0 or torch.equal(now, then) != is_used(gate)
        assert bucket.steps[place] - before[1][place] == is_used(gate)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64])
@every_impl
def test_used_is_of_any_dtype_and_strides_and_may_tell_of_more(impl, dtype):
    bucket, gradients = make(torch.float32)
    expected, _ = make(torch.float32)
    adamw_(expected, gradients, used_of(), impl=impl)
    wider = torch.nn.functional.pad(used_of().clamp(max=1), (0, 2, 0, 2)).to(dtype)
    used = wider.t().contiguous().t()
    assert used.stride() != wider.stride()
    adamw_(bucket, gradients, used, impl=impl)
    assert all(map(torch.equal, state_of(bucket), state_of(expected)))


@every_impl
def test_a_learning_rate_on_the_device_is_read_there(impl):
    bucket, gradients = make(EXACT[impl])
    expected, _ = make(EXACT[impl])
    adamw_(expected, gradients, used_of(), lr=0.25, impl=impl)
    adamw_(bucket, gradients, used_of(), lr=torch.tensor(0.25), impl=impl)
    assert all(map(torch.equal, state_of(bucket), state_of(expected)))


@every_impl
def test_bias_corrections_hold_late_and_for_betas_near_one(impl):
    """(1 - beta) ** step in float32 would lose them."""
    for count, beta in ((0.0, 0.9999), (1e5, 0.99999), (3.0, 0.0)):
        one, expected = torch.ones(3), torch.ones(3, dtype=torch.float64)
        zeros = [torch.zeros(3)], [torch.zeros(3)], [torch.tensor(count)]
        gradient = torch.tensor([1e-3, -2.0, 0.5])
        adamw_(
            Bucket([one], None, *zeros), [gradient], lr=0.1, betas=(beta, beta), eps=1e-30,
            weight_decay=0.0, impl=impl,
        )  # fmt: skip
        g, rest = gradient.double(), 1 - beta
        corrected = 1 - beta ** (count + 1)
        expected -= 0.1 * (rest * g / corrected) / (rest * g**2 / corrected).sqrt()
        torch.testing.assert_close(one.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("skip", [0, 1], ids=["aligned", "anywhere"])
@every_dtype
@every_impl
def test_the_norm_is_of_what_is_there_and_was_used(impl, dtype, skip):
    bucket, gradients = make(dtype, skip)
    gradients[0] = None
    for place, gate in enumerate(GATES):
        if not is_used(gate):
            gradients[place].fill_(NAN)
    taken = [g for g, gate in zip(gradients, GATES, strict=True) if g is not None and is_used(gate)]
    found = gradient_norm(bucket, gradients, used_of(), impl=impl)
    exact = math.sqrt(math.fsum(x**2 for g in taken for x in g.flatten().tolist()))
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    rounding = torch.finfo(found.dtype).eps
    assert abs(found.item() - exact) <= exact * rounding * sum(g.numel() for g in taken) ** 0.5
    assert torch.equal(found, gradient_norm(bucket, gradients, used_of(), impl=impl))


@every_impl
def test_without_a_gradient_the_norm_is_zero_and_nothing_is_scaled(impl):
    bucket, gradients = make(torch.float32)
    none = [None] * len(gradients)
    assert gradient_norm(bucket, none, used_of(), impl=impl) == 0
    scale_gradients_(bucket, none, torch.tensor(0.5), used_of(), impl=impl)
    empty = Bucket([torch.zeros(0)], None, [torch.zeros(0)], [torch.zeros(0)], [torch.tensor(0.0)])
    assert gradient_norm(empty, [torch.zeros(0)], impl=impl) == 0
    adamw_(empty, [torch.zeros(0)], impl=impl)


@every_impl
def test_a_used_gradient_s_nan_is_the_norm_s(impl):
    bucket, gradients = make(torch.float32)
    gradients[1][-1, -1] = NAN
    assert gradient_norm(bucket, gradients, used_of(), impl=impl).isnan()


@pytest.mark.parametrize("skip", [0, 1], ids=["aligned", "anywhere"])
@every_dtype
@every_impl
def test_scaling_touches_what_was_used(impl, dtype, skip):
    bucket, gradients = make(dtype, skip)
    before = [gradient.clone() for gradient in gradients]
    factor = torch.tensor(0.37)
    scale_gradients_(bucket, gradients, factor, used_of(), impl=impl)
    for gate, now, then in zip(GATES, gradients, before, strict=True):
        if not is_used(gate):
            assert torch.equal(now, then)
        elif now.numel():
            exact, rough = then.double() * factor.double(), then * factor.to(dtype)
            assert_within_budget(now, exact, rough)


@every_impl
def test_a_factor_of_one_changes_nothing_and_of_nan_everything(impl):
    bucket, gradients = make(torch.float32)
    before = [gradient.clone() for gradient in gradients]
    scale_gradients_(bucket, gradients, torch.tensor(1.0), used_of(), impl=impl)
    assert all(map(torch.equal, gradients, before))
    scale_gradients_(bucket, gradients, torch.tensor(NAN), used_of(), impl=impl)
    assert gradients[1].isnan().all()


@only_triton
def test_a_bucket_follows_tensors_that_move(impl):
    """As a checkpoint or FSDP moves them: by `.data`, or other storage."""
    bucket, gradients = make(torch.float32)
    expected, _ = make(torch.float32)
    for _ in range(2):
        adamw_(expected, gradients, used_of(), **OPTIONS, impl=impl)
        adamw_(bucket, gradients, used_of(), **OPTIONS, impl=impl)
        old = [x.data for x in state_of(bucket)]
        for x in state_of(bucket):
            x.data = x.data.clone(memory_format=torch.preserve_format)
        for x in old:
            x.fill_(NAN)
    assert all(map(torch.equal, state_of(bucket), state_of(expected)))


@every_impl
def test_autograd_is_told_of_what_changes(impl):
    bucket, gradients = make(torch.float32)
    tensors = [*state_of(bucket), *bucket.steps, *gradients]
    before = [x._version for x in tensors]
    scale_gradients_(bucket, gradients, torch.tensor(0.5), used_of(), impl=impl)
    adamw_(bucket, gradients, used_of(), impl=impl)
    pairs = zip(tensors, before, strict=True)
    assert impl == "reference" or all(x._version > then for x, then in pairs)


def test_ops_hold_to_their_schemas():
    from tossup.kernels.adamw import ops, present

    bucket, gradients = make(torch.float32)
    given = present(gradients)
    tables = bucket.host, bucket.table, bucket.owner, used_of()
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.tossup.gradient_norm, (bucket.params, *given, *tables, "cpu"), test_utils=checks
    )
    torch.library.opcheck(
        ops.scale_gradients_op.overload, (*given, torch.tensor(0.5), *tables, "cpu"),
        test_utils=checks,
    )  # fmt: skip
    state = bucket.exp_avgs, bucket.exp_avg_sqs, bucket.steps
    numbers = 1e-3, 0.9, 0.99, 1e-8, 0.1, False
    torch.library.opcheck(
        ops.adamw_op.overload, (bucket.params, *given, *state, *tables, None, *numbers, "cpu"),
        test_utils=checks,
    )  # fmt: skip


def one(*shape: int, **options) -> Tensor:
    return torch.ones(*shape, **options)


def test_buckets_refuse_what_does_not_belong_together():
    step = [torch.tensor(0.0)]
    for arguments, message in (
        (([one(3), one(3).half()],), r"params must be of one dtype on one device, got torch.float"),
        (([one(3)], [None, None]), "gates must be as many as parameters, got 2 and 1"),
        (([one(3)], None, [one(4)], [one(3)], step), r"exp_avgs must be like .* of \(4,\)"),
        (([one(3)], None, [one(3)], [one(3).double()], step), "exp_avg_sqs must be like"),
        (([one(3)], None, [one(3)], [one(3)], [one(1)]), r"steps must be float32 of shape \(\)"),
    ):
        with pytest.raises(ValueError, match=message):
            Bucket(*arguments)


@every_impl
def test_what_does_not_fit_is_refused_in_a_sentence(impl):
    bucket, gradients = make(torch.float32)
    calls = (
        lambda g, used: adamw_(bucket, g, used, impl=impl),
        lambda g, used: gradient_norm(bucket, g, used, impl=impl),
        lambda g, used: scale_gradients_(bucket, g, torch.tensor(0.5), used, impl=impl),
    )
    transposed = [*gradients[:2], one(7001, 3).t(), *gradients[3:]]
    half = [gradients[0].half(), *gradients[1:]]
    for call in calls:
        for given, used, message in (
            (gradients[1:], used_of(), "gradients must be as many as parameters, got 6 and 7"),
            (transposed, used_of(), "gradients must be like their parameters, got .* strides"),
            (half, used_of(), "gradients must be like their parameters, got torch.float16"),
            (gradients, None, "used is None, but parameters have gates"),
            (gradients, used_of()[:2], r"used has shape \(2, 2\), but the gates need \(3, 2\)"),
        ):
            with pytest.raises(ValueError, match=message):
                call(given, used)
    with pytest.raises(ValueError, match="lr must be floating of shape"):
        adamw_(bucket, gradients, used_of(), lr=one(1), impl=impl)
    with pytest.raises(ValueError, match="factor must be floating of shape"):
        scale_gradients_(bucket, gradients, torch.tensor(2), used_of(), impl=impl)
    with pytest.raises(ValueError, match="the bucket has no state"):
        adamw_(Bucket([one(3)]), [one(3)], impl=impl)


@only_triton
def test_gaps_between_elements_are_refused(impl):
    bucket = Bucket([torch.zeros(3, 4)[:, ::2]])
    with pytest.raises(ValueError, match="params must fill their memory without gaps"):
        gradient_norm(bucket, [torch.zeros(3, 4)[:, ::2]], impl=impl)
