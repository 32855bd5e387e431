"""AdamW for supernets: a mixer that a step did not use is left alone, without the host knowing.

Every parameter of a mixer has its gate, (layer, mixer), and one launch goes over the parameters of
all gates (kernels/adamw).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from ..kernels.adamw import Bucket, Gate, adamw_, gradient_norm, scale_gradients_
from ..kernels.transfer import send
from .ownership import refuse_shared_beyond
from .router import Router
from .stochastic import StochasticMixer

Group = dict[str, Any]


class _Options(NamedTuple):
    """What parameters of one bucket have in common. A tensor lr is told by its identity."""

    lr: float | int
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    inactive: Literal["skip", "decay"]

    @classmethod
    def of(cls, group: Group) -> "_Options":
        lr = group["lr"]
        options = (group[name] for name in cls._fields[2:])
        return cls(id(lr) if isinstance(lr, Tensor) else lr, tuple(group["betas"]), *options)


class _Bucket(NamedTuple):
    """What one launch updates: parameters of groups that have the same options, the first's."""

    group: Group
    params: list[Tensor]
    local: Bucket

    @property
    def gradients(self) -> list[Tensor | None]:
        return [None if param.grad is None else _local(param.grad) for param in self.params]


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
        }
        self.router = router
        self._partition: list[int] = []  # for each group the first that has the same options
        self._buckets: list[_Bucket] = []
        super().__init__(params, defaults)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, as in torch; its gate may be given as any pair of integers."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _check(group)
        if group["gate"] is not None:
            group["gate"] = tuple(group["gate"])
        self._begin(group["params"])
        self._partition = []

    def _begin(self, params: Iterable[Tensor]) -> None:
        """Give state to those that have none."""
        for param in params:
            if param not in self.state:
                self.state[param] = {
                    "step": torch.zeros((), dtype=torch.float32, device=param.device),
                    "exp_avg": torch.zeros_like(param, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(param, memory_format=torch.preserve_format),
                }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore state and options, torch's AdamW's too; what those have not stays as it is.

        Raises ValueError where the saved groups have other gates, or options that are not here.
        """
        here = [group["gate"] for group in self.param_groups]
        saved = [group.get("gate") for group in state_dict["param_groups"]]
        if saved != here:
            raise ValueError(
                f"state_dict has parameter groups with gates {saved}, this optimizer takes {here}"
            )
        groups = []
        for mine, group in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for option in ("amsgrad", "maximize"):
                if group.get(option):
                    raise ValueError(f"state_dict has {option}, which this optimizer has not")
            if not group.get("decoupled_weight_decay", True):
                raise ValueError("state_dict is Adam's, whose weight decay enters the moments")
            # capturable: torch then puts `step` on the parameter's device
            groups.append({**mine, **group, "capturable": True})
        super().load_state_dict({**state_dict, "param_groups": groups})
        for group in self.param_groups:
            del group["capturable"]
            self._begin(group["params"])  # torch has none of what never had a gradient

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"router": self.router}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._partition = []  # what was made of it holds tensors and groups just replaced

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
        used = self.used_or(used)
        for bucket in self.buckets():
            group = bucket.group
            adamw_(
                bucket.local,
                bucket.gradients,
                used,
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                inactive=group["inactive"],
            )
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

    def buckets(self) -> list[_Bucket]:
        """What is launched together, made anew where groups, their options or state changed."""
        first: dict[_Options, int] = {}
        options = map(_Options.of, self.param_groups)
        partition = [first.setdefault(of_group, place) for place, of_group in enumerate(options)]
        if partition != self._partition:
            self._partition = partition
            self._buckets = _buckets(self.param_groups, partition, self.state)
        return self._buckets


def parameter_groups(model: nn.Module, weight_decay: float | None = None) -> list[Group]:
    """A model's trainable parameters as GatedAdamW takes them, each behind the gate that it needs.

    model: any module; the mixers of the StochasticMixers inside it get the gates (layer, mixer),
        the mixer by its place among the layer's. What several of them share, and everything else,
        is shared.
    weight_decay: of matrices, stacks of several too; None is the optimizer's. Norms, biases,
        convolutions, `A_log`, `D` and what mamba_ssm and others mark with `_no_weight_decay` do not
        decay.

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
    convolutions = [m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)]
    taps = {parameter for m in convolutions for parameter in m.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            marked = name.endswith("A_log") or getattr(parameter, "_no_weight_decay", False)
            matrix = parameter.ndim == 2 or (parameter.ndim > 2 and len(parameter) > 1)
            decays = matrix and not marked and parameter not in taps
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
    gradients hold, NaN included, does not enter it, and stays as it is.
    """
    if isinstance(optimizer, GatedAdamW):
        used, buckets = optimizer.used_or(used), optimizer.buckets()
    else:
        groups = optimizer.param_groups if isinstance(optimizer, Optimizer) else list(optimizer)
        buckets = _buckets(groups, [0] * len(groups))
    norms = [_norm(bucket, used) for bucket in buckets]
    total = get_total_norm(norms)
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)  # as torch has it
    for bucket in buckets:
        scale_gradients_(bucket.local, bucket.gradients, factor.to(bucket.local.device), used)
    return total


def forget_gradients(model: nn.Module, optimizer: Optimizer) -> None:
    """Clear the gradients before the next step, in place of `optimizer.zero_grad()`.

    model: in which StochasticMixers under device dispatch keep the memory of their mixers'
        gradients, as a captured step needs it; their next backward pass overwrites it. A mixer that
        no sample takes leaves it as it is, so the optimizer must know what was used. Among several
        ranks it is zeroed, because their gradients are summed, and so is what is sharded, because
        FSDP2 adds to what it finds.
    """
    layers = [module for module in model.modules() if isinstance(module, StochasticMixer)]
    routed = [layer for layer in layers if layer.dispatch == "device"]
    kept = {parameter for layer in routed for parameter in layer.mixers.parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if group.get("gate") is None or parameter not in kept:
                parameter.grad = None
    among_ranks = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    gradients = [parameter.grad for parameter in kept if parameter.grad is not None]
    added_to = [_local(g) for g in gradients if among_ranks or _is_sharded(g)]
    if added_to:
        torch._foreach_zero_(added_to)
    for layer in routed:
        layer.forget_gradients()


def _norm(bucket: _Bucket, used: Tensor | None) -> Tensor:
    """Of a bucket's gradients; where ranks have a part of each, of all parts."""
    if not _is_sharded(bucket.params[0]):
        return gradient_norm(bucket.local, bucket.gradients, used)
    rows = [
        (param.grad, gate)
        for param, gate in zip(bucket.params, bucket.local.gates, strict=True)
        if param.grad is not None
    ]
    bucket.local.check_used(used)
    if not rows:
        return torch.zeros((), device=bucket.local.device)
    gradients, gates = zip(*rows, strict=True)
    norms: Any = torch.stack(torch._foreach_norm(gradients))
    norms = norms.full_tensor()  # as FSDP2 does: one sum over the ranks
    if used is not None:
        flags = [used.new_ones(()) if gate is None else used[gate] for gate in gates]
        norms = torch.where(torch.stack(flags) > 0, norms, 0)
    return torch.linalg.vector_norm(norms)


def _buckets(
    groups: Sequence[Group], partition: Sequence[int], state: Mapping[Tensor, Any] | None = None
) -> list[_Bucket]:
    """One for each part, device and dtype, and mesh of ranks where these share a parameter."""
    rows: dict[tuple[Any, ...], list[tuple[Tensor, Gate | None]]] = {}
    for part, group in zip(partition, groups, strict=True):
        for param in group["params"]:
            key = part, param.device, param.dtype, getattr(param, "device_mesh", None)
            rows.setdefault(key, []).append((param, group.get("gate")))
    return [
        _Bucket(groups[part], [param for param, _ in members], _of_this_rank(members, state))
        for (part, *_), members in rows.items()
    ]


def _of_this_rank(
    members: Sequence[tuple[Tensor, Gate | None]], state: Mapping[Tensor, Any] | None
) -> Bucket:
    params, gates = zip(*members, strict=True)
    columns = [
        [_local(state[param][name]) for param in params]
        for name in ("exp_avg", "exp_avg_sq", "step")
        if state is not None
    ]
    return Bucket([_local(param) for param in params], gates, *columns)


def _local(tensor: Any) -> Tensor:
    """What this rank has of it."""
    return tensor.to_local() if _is_sharded(tensor) else tensor


def _is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, which takes long to import, so that nobody does who has none."""
    return hasattr(tensor, "device_mesh")


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
