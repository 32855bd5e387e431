"""AdamW for supernets: a mixer that a step did not use is left alone, without the host knowing.

AdamW is Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (ICLR 2019, algorithm 2). A
zero gradient is not the same as no update: momentum goes on moving the weights, decay goes on
shrinking them, and the bias correction goes on counting. So every gate (one mixer of one layer)
has its own fused call, and a flag on the device decides whether that call writes. All that is
around these calls, counting and clipping, is done for all gates together: it costs launches.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import compress
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from ..kernels.transfer import send
from .ownership import refuse_shared_beyond
from .router import Router
from .stochastic import StochasticMixer

Group = dict[str, Any]
KeyT = TypeVar("KeyT")
ItemT = TypeVar("ItemT")


class _Bucket(NamedTuple):
    """Parameters of one group, on one device, of one dtype, and their state."""

    params: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]


class _Flag(NamedTuple):
    """Whether a step used a gate's mixer: two float32 scalars on the device, one 1, the other 0."""

    used: Tensor
    unused: Tensor


class _Update(NamedTuple):
    """What one fused call does, to those of a bucket's parameters that have a gradient.

    flag: None updates; else parameters, moments and step counts of an unused mixer stay as they are
    """

    group: Group
    bucket: _Bucket
    gradients: list[Tensor]
    flag: _Flag | None


class GatedAdamW(Optimizer):
    """AdamW whose parameters are shared (always updated) or behind a gate (layer, mixer).

    params: parameters, or groups as any torch optimizer takes them. A group's `gate` is the
        (layer, mixer) that its parameters belong to, or None (the default): shared. Pass only
        parameters that train: state is made here and not in the first step, so that a step can be
        captured in a CUDA graph.
    lr: a float, or a 0-d float32 tensor on the device (which a captured step reads at each replay).
    betas, eps, weight_decay: as torch's AdamW has them, but with the defaults that language models
        are trained by, (0.9, 0.95) and 0.1.
    router: who draws the tables. `step` and `clip_grad_norm_` then know which mixers were used, as
        loops need that are not written for supernets, such as that of transformers' Trainer.
    inactive: what happens to a mixer that no sample took. `skip`: its parameters, moments and step
        counts stay bit for bit what they were. `decay`: it takes a step with a zero gradient, so
        momentum and weight decay go on, as in Fast-LLM.

    Options may differ from group to group. The state of a parameter is torch's: `exp_avg` and
    `exp_avg_sq` like the parameter, and `step`, a float32 scalar on the parameter's device.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        router: Router | None = None,
        inactive: Literal["skip", "decay"] = "skip",
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "inactive": inactive,
            "gate": None,
            "capturable": True,  # tells load_state_dict to put `step` on the parameter's device
        }
        self.router = router
        self._buckets: list[list[_Bucket]] | None = None  # per group, until groups or state change
        super().__init__(params, defaults)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, as in torch; its gate may be given as any pair of integers."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _check(group)
        if group["gate"] is not None:
            group["gate"] = tuple(group["gate"])
        for param in group["params"]:
            self.state[param] = {
                "step": torch.zeros((), dtype=torch.float32, device=param.device),
                "exp_avg": torch.zeros_like(param, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(param, memory_format=torch.preserve_format),
            }
        self._buckets = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore state and options. Raises ValueError where the saved groups have other gates."""
        saved = [group.get("gate") for group in state_dict["param_groups"]]
        here = [group["gate"] for group in self.param_groups]
        if saved != here:
            raise ValueError(
                f"state_dict has parameter groups with gates {saved}, this optimizer takes {here}"
            )
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"router": self.router}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._buckets = None  # its lists hold the tensors and groups that were just replaced

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, used: Tensor | None = None) -> Any:
        """Update every shared parameter, and the mixers that were used.

        closure: computes the loss and its gradients first, as in torch. Its result is returned.
        used: any real dtype, (layers, mixers), on the parameters' device; above zero where some
            sample took the mixer, in whichever micro-batch. Where there are gates it is needed,
            unless there is a router, which knows of all tables since the last step.

        Parameters without a gradient are passed over, as in torch; under `decay` a gated one counts
        as having a zero gradient. Nothing is read from the device.
        """
        if isinstance(closure, Tensor):
            raise TypeError("step takes what was used by name: step(used=table.count)")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        flags = _flags(self.param_groups, self.used_or(used))
        if self._buckets is None:
            self._buckets = [self._split(group) for group in self.param_groups]
        updates = [
            _update(group, bucket, flag)
            for group, flag, buckets in zip(self.param_groups, flags, self._buckets, strict=True)
            for bucket in buckets
        ]
        _count(updates)
        for update in updates:
            _adamw(update)
        if self.router is not None:
            self.router.begin_step()
        return loss

    def used_or(self, used: Tensor | None) -> Tensor | None:
        """What was used in this step: as told, or else by the router, on the parameters' device."""
        if used is not None or self.router is None:
            return used
        gated = [p for g in self.param_groups if g["gate"] is not None for p in g["params"]]
        if not gated:
            return None
        if self.router.drawn == 0:
            raise ValueError("the router has drawn no table since the last step; call draw(batch)")
        return send(self.router.used, gated[0].device)

    def _split(self, group: Group) -> list[_Bucket]:
        kinds = _grouped((_kind(param), param) for param in group["params"])
        return [
            _Bucket(
                params,
                *(
                    [self.state[param][name] for param in params]
                    for name in ("exp_avg", "exp_avg_sq", "step")
                ),
            )
            for params in kinds.values()
        ]


def parameter_groups(model: nn.Module, weight_decay: float | None = None) -> list[Group]:
    """A model's trainable parameters as GatedAdamW takes them, each behind the gate that it needs.

    model: any module; the mixers of the StochasticMixers inside it get the gates (layer, mixer),
        the mixer by its place among the layer's. What several of them share, and everything else,
        is shared.
    weight_decay: of matrices; None is the optimizer's. Norms, biases, convolutions, `A_log`, `D`
        and what is marked `_no_weight_decay`, as mamba_ssm and others do, do not decay.

    Raises ValueError where two layers have one number, and where a mixer under device dispatch
    shares a parameter with another module: its backward pass would overwrite the other's part of
    the gradient.
    """
    routed = [
        (path, module)
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, StochasticMixer) and module.dispatch == "device"
    ]
    refuse_shared_beyond(routed, model)
    gates: dict[Tensor, tuple[int, int] | None] = {}
    places: dict[int, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, StochasticMixer):
            if module.layer in places:
                raise ValueError(
                    f"layer takes a number of its own in every StochasticMixer, got {module.layer} "
                    f"in {places[module.layer]} and in {path}"
                )
            places[module.layer] = path
            for index, mixer in enumerate(module.mixers.values()):
                gate = (module.layer, index)
                for parameter in mixer.parameters():
                    gates[parameter] = gate if gates.get(parameter, gate) == gate else None
    groups: dict[tuple[Any, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spared = name.endswith("A_log") or getattr(parameter, "_no_weight_decay", False)
            decays = parameter.ndim == 2 and not spared
            groups.setdefault((gates.get(parameter), decays), []).append(parameter)
    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    return [
        {"params": parameters, "gate": gate} | (decay if decays else {"weight_decay": 0.0})
        for (gate, decays), parameters in groups.items()
    ]


def clip_grad_norm_(
    optimizer: Optimizer | Iterable[Group], max_norm: float, used: Tensor | None = None
) -> Tensor:
    """Scale gradients in place so that those of shared and used parameters have `max_norm` at most.

    optimizer: a GatedAdamW, or its groups; gradients may be DTensors, as FSDP2's are. used: as in
        `GatedAdamW.step`.
    Returns the total L2 norm before scaling, a 0-d tensor on the device. Whatever an unused mixer's
    gradients hold, NaN included, does not enter it.
    """
    groups = list(optimizer.param_groups if isinstance(optimizer, Optimizer) else optimizer)
    if isinstance(optimizer, GatedAdamW):
        used = optimizer.used_or(used)
    kinds = _grouped(
        ((_kind(param.grad), getattr(param.grad, "device_mesh", None)), (param.grad, flag))
        for group, flag in zip(groups, _flags(groups, used), strict=True)
        for param in group["params"]
        if param.grad is not None
    )
    norms = []
    for ((device, _), sharded), rows in kinds.items():
        always = torch.ones((), device=device)
        counts = torch.stack([always if flag is None else flag.used for _, flag in rows])
        each: Any = torch.stack(torch._foreach_norm([gradient for gradient, _ in rows]))
        if sharded is not None:  # as FSDP2 does: one sum over the ranks
            each = each.full_tensor()
        norms.append(torch.where(counts > 0, each, 0))
    total = get_total_norm(norms)
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)  # as torch has it
    for ((device, _), sharded), rows in kinds.items():
        gradients = [gradient for gradient, _ in rows]
        if sharded is not None:
            gradients = [gradient.to_local() for gradient in gradients]
        torch._foreach_mul_(gradients, factor.to(device))
    return total


def _flags(groups: Sequence[Group], used: Tensor | None) -> list[_Flag | None]:
    """For each group, None if it is shared."""
    gated = [group for group in groups if group.get("gate") is not None]
    if not gated:
        return [None] * len(groups)
    if used is None:
        raise ValueError("used is None, but parameters have gates; pass a (layers, mixers) tensor")
    layers, mixers = (1 + max(group["gate"][axis] for group in gated) for axis in (0, 1))
    if used.dim() != 2 or used.shape[0] < layers or used.shape[1] < mixers:
        raise ValueError(
            f"used has shape {tuple(used.shape)}, but the gates need ({layers}, {mixers}) or more"
        )
    for device in {param.device for group in gated for param in group["params"]}:
        if device != used.device:
            raise ValueError(f"used is on {used.device}, but gated parameters are on {device}")
    table = (used > 0).float()
    flags = [
        [_Flag(*flag) for flag in zip(row_used.unbind(), row_unused.unbind(), strict=True)]
        for row_used, row_unused in zip(table, 1 - table, strict=True)
    ]
    gates = [group.get("gate") for group in groups]
    return [None if gate is None else flags[gate[0]][gate[1]] for gate in gates]


def _kind(tensor: Tensor) -> tuple[torch.device, torch.dtype]:
    """What the tensors of one fused call have in common."""
    return tensor.device, tensor.dtype


def _grouped(items: Iterable[tuple[KeyT, ItemT]]) -> dict[KeyT, list[ItemT]]:
    groups: dict[KeyT, list[ItemT]] = {}
    for key, item in items:
        groups.setdefault(key, []).append(item)
    return groups


def _update(group: Group, bucket: _Bucket, flag: _Flag | None) -> _Update:
    gradients = [param.grad for param in bucket.params]
    if flag is not None and group["inactive"] == "decay":
        zeroed = [
            _zero_unless(flag.used, gradient, param)
            for gradient, param in zip(gradients, bucket.params, strict=True)
        ]
        return _Update(group, bucket, zeroed, None)
    present = [gradient is not None for gradient in gradients]
    kept = _Bucket(*(list(compress(column, present)) for column in bucket))
    return _Update(group, kept, [gradient for gradient in gradients if gradient is not None], flag)


def _zero_unless(used: Tensor, gradient: Tensor | None, param: Tensor) -> Tensor:
    """The gradient where the mixer was used, else zeros, whatever it holds."""
    return torch.zeros_like(param) if gradient is None else torch.where(used > 0, gradient, 0)


def _count(updates: Sequence[_Update]) -> None:
    """Add 1 to the step counts of all that is updated. The fused calls only read them."""
    always, gated, flags = [], [], []
    for update in updates:
        steps = update.bucket.steps
        if update.flag is None:
            always += steps
        else:
            gated += steps
            flags += [update.flag.used] * len(steps)
    if always:
        torch._foreach_add_(always, 1)
    if gated:  # a list of flags: adding one tensor to many reads it on the host
        torch._foreach_add_(gated, flags)


def _adamw(update: _Update) -> None:
    """One fused call. Where `found_inf` is 1, exactly, it writes nothing, be the gradients NaN."""
    group, bucket, gradients, flag = update
    if not gradients:
        return
    torch._fused_adamw_(
        bucket.params,
        gradients,
        bucket.exp_avgs,
        bucket.exp_avg_sqs,
        [],
        bucket.steps,
        lr=group["lr"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
        found_inf=None if flag is None else flag.unused,
    )


def _check(group: Group) -> None:
    """Raise ValueError for an option that makes no sense. A tensor lr is not read."""
    lr, gate = group["lr"], group["gate"]
    if isinstance(lr, Tensor) and lr.dim() != 0:
        raise ValueError(f"lr has shape {tuple(lr.shape)}, it takes a float or a 0-d tensor")
    if not isinstance(lr, Tensor) and lr < 0:
        raise ValueError(f"lr is {lr}, it takes a number of at least 0")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas are {group['betas']}, both take a number in [0, 1)")
    for name in ("eps", "weight_decay"):
        if group[name] < 0:
            raise ValueError(f"{name} is {group[name]}, it takes a number of at least 0")
    if group["inactive"] not in ("skip", "decay"):
        raise ValueError(f"inactive is {group['inactive']!r}, it takes 'skip' or 'decay'")
    if gate is not None and (
        len(gate) != 2 or not all(isinstance(i, int) and i >= 0 for i in gate)
    ):
        raise ValueError(f"gate is {gate!r}, it takes None or a (layer, mixer) pair of indices")
