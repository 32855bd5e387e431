"""StochasticMixer: several mixers in one layer's place, and a table that says which one runs.

Training follows the mixer table, evaluation takes the main mixer, `placement=` overrides both.
Under device dispatch training takes a table alone.

    dispatch="device"  all mixers are launched, and their kernels follow the table
    dispatch="host"    a Python branch on the table: the chosen mixers run, on their own samples
    dispatch="dense"   every mixer runs on every sample and the result is selected: the oracle
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..kernels.precision import autocast
from ..kernels.routing import MixerTable
from .call import Call, named_kwargs
from .config import check_mixer_name
from .device_dispatch import DeviceDispatch, RoutedMixer, check_routed
from .metrics import Mean
from .mixers.packing import PACKING_KWARGS, packing_of
from .ownership import refuse_shared_within
from .router import Router

Dispatch = Literal["device", "host", "dense"]

# Keyword arguments whose tensors have a row per sample and follow a sample to its mixer. Tensors of
# one row serve every sample.
BATCHED_KWARGS = frozenset({"attention_mask", "position_ids", "position_embeddings", "seq_idx"})


class StochasticMixer(nn.Module):
    """One of several mixers per sample, as the mixer table says.

    mixers: modules by name, in the order of the table's indices. Each maps hidden_states (batch,
        seqlen, hidden) to a tensor of that shape, or to a tuple that begins with one, and gets
        those of the keyword arguments that its forward takes.
    layer: this layer's row of the table. It may be left out, for 0, where a router has one row.
    router: where the table comes from in training unless forward is given one.
    main_mixer_name: the mixer of evaluation; defaults to the first.
    dispatch: device, host or dense. With device, mixers are those of `tossup.supernet.mixers`;
        while they follow a table they take no cache, do not ask the device whether a mask is one
        that they can follow (an error of its own says so), are not called, so that their hooks do
        not run, and find their gradients written to `.grad` by the backward pass,
        `torch.autograd.grad`'s too. Activation memory is the largest mixer's. `forget_gradients`
        replaces clearing gradients, but for evaluations inside of torch.compile, whose gradients
        are added to what there is.
    streams: whether device dispatch launches each mixer on a CUDA stream of its own, so that mixers
        of different samples overlap.
    num_outputs: 1 returns a tensor; 2 returns (out, None) as attention in transformers does; 3
        returns (out, None, past_key_values) as layers in fla do.
    batched_kwargs: names of further keyword arguments that have a row per sample.

    A mixer may take `losses` and `metrics`, dicts to which it adds tensors of one value per sample
    of its own. They come out under "mixer's name/key", averaged over the samples that took the
    mixer. Where a model has computed something for a mixer ahead, such as rotary angles, that mixer
    alone gets it through `preprocessed`.

    Mixers that a step did not choose have no gradients under host dispatch: wrap the model in
    DistributedDataParallel with find_unused_parameters=True.
    Raises ValueError in training where there is neither a table nor a placement.
    """

    def __init__(
        self,
        mixers: Mapping[str, nn.Module],
        *,
        layer: int | None = None,
        router: Router | None = None,
        main_mixer_name: str | None = None,
        dispatch: Dispatch = "host",
        streams: bool = False,
        num_outputs: Literal[1, 2, 3] = 1,
        batched_kwargs: frozenset[str] | set[str] = frozenset(),
    ):
        super().__init__()
        if not mixers:
            raise ValueError("mixers takes at least one mixer, got none")
        for name in mixers:
            check_mixer_name(name)
        if router is not None and router.strategy.mixers != len(mixers):
            raise ValueError(
                f"router draws among {router.strategy.mixers} mixers, got {len(mixers)} of them"
            )
        if layer is None:
            if router is not None and router.layers > 1:
                raise ValueError(f"layer takes 0 to {router.layers - 1}, got none")
            layer = 0
        if layer < 0 or (router is not None and layer >= router.layers):
            layers = "a row of the table" if router is None else f"0 to {router.layers - 1}"
            raise ValueError(f"layer takes {layers}, got {layer}")
        if dispatch not in get_args(Dispatch):
            raise ValueError(f"dispatch takes device, host or dense, got {dispatch!r}")
        if num_outputs not in (1, 2, 3):
            raise ValueError(f"num_outputs takes 1, 2 or 3, got {num_outputs}")
        self.mixers = nn.ModuleDict(mixers)
        self.names = tuple(mixers)
        self.main_mixer_name = main_mixer_name or self.names[0]
        self._check_name("main_mixer_name", self.main_mixer_name)
        self.layer, self.router, self.dispatch, self.streams = layer, router, dispatch, streams
        self.num_outputs = num_outputs
        self.batched_kwargs = BATCHED_KWARGS | batched_kwargs
        # What mixers were made of when last checked: kept, lest another object get an id of theirs
        self._checked: list[Any] = []
        if dispatch == "device":
            self._check_routed()
        # int32, per mixer, on the device, made of this number when there is one: above 0 gradients
        # are added to, as is right for what autograd or an optimizer left; at 0 overwritten.
        self.written: Tensor | int = 1
        self.followed: list[MixerTable] = []  # the router's last two, since `passed_back`
        self.passed_back = False

    def forget_gradients(self) -> None:
        """Let the next backward pass overwrite the mixers' gradients, whatever they hold.

        For device dispatch, in place of clearing them: memory that no mixer writes stays as it is,
        so only an optimizer that knows which mixers were used may read it.
        """
        if isinstance(self.written, Tensor):
            self.written.zero_()
        else:
            self.written = 0

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        *,
        table: MixerTable | None = None,
        placement: str | Sequence[str] | None = None,
        preprocessed: Mapping[str, Mapping[str, Any]] | None = None,
        losses: dict[str, Mean] | None = None,
        metrics: dict[str, Mean] | None = None,
        **kwargs: Any,
    ) -> Tensor | tuple[Any, ...]:
        """Mix along the sequence.

        hidden_states: (batch, seqlen, hidden). table: whom to follow, also in evaluation; defaults
        to the router's in training. placement: one mixer's name for the whole batch, over all else,
        or one for each layer, of which this layer's counts.
        preprocessed: further keyword arguments of each mixer, by its name.
        """
        kwargs.update(
            attention_mask=attention_mask, past_key_values=past_key_values, use_cache=use_cache
        )
        call = Call(self, hidden_states, kwargs, preprocessed or {}, losses, metrics)
        chosen = self._chosen(table, placement)
        if isinstance(chosen, str):
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                self._let_autograd_add(chosen, hidden_states.device)
            out = call.run(chosen)
        else:
            self._check_table(chosen, hidden_states.shape[0])
            follow = {"device": self._device, "host": self._host, "dense": self._dense}
            out = follow[self.dispatch](call, chosen)
            if self.followed and out.requires_grad and not torch.compiler.is_compiling():
                out.register_hook(self._pass_back)
        return (out, None, past_key_values)[: self.num_outputs] if self.num_outputs > 1 else out

    def _chosen(
        self, table: MixerTable | None, placement: str | Sequence[str] | None
    ) -> MixerTable | str:
        if placement is not None:
            if not isinstance(placement, str):
                if len(placement) <= self.layer:
                    raise ValueError(
                        f"placement takes a name, or one for each layer, got {len(placement)}, "
                        f"none for layer {self.layer}"
                    )
                placement = placement[self.layer]
            self._check_name("placement", placement)
            if self.dispatch == "device" and self.training and torch.is_grad_enabled():
                raise ValueError(
                    "dispatch='device' trains by a mixer table: pass table= for placement=, such "
                    "as MixerTable.of a table of one row per layer"
                )
            return placement
        if table is not None:
            return table
        if not self.training:
            return self.main_mixer_name
        if self.router is None or self.router.table is None:
            raise ValueError(
                "training follows a mixer table: call the router's draw(batch) before each step, "
                "or pass table= or placement="
            )
        self._follow(self.router.table)
        return self.router.table

    def _follow(self, table: MixerTable) -> None:
        """Keep track of what the router's tables were since the last backward pass: one of them is
        what a forward pass followed that checkpointing runs again, and nothing tells which."""
        if in_backward():
            self.passed_back = True
            if any(followed is not table for followed in self.followed):
                raise ValueError(
                    "gradient checkpointing runs a forward pass again, but the router has drawn "
                    "since: call draw after the backward pass, or pass table="
                )
            return
        if self.passed_back:
            self.followed, self.passed_back = [], False
        self.followed = [*self.followed[-1:], table]

    def _pass_back(self, _gradient: Tensor) -> None:
        self.passed_back = True

    @torch._disable_dynamo  # the views of slots as other dtypes come out wrong of Inductor
    def _device(self, call: Call, table: MixerTable) -> Tensor:
        self._check_routed()  # again, as modules may have been exchanged
        x = call.hidden_states
        named = set().union(*(named_kwargs(mixer) for mixer in self.mixers.values()))
        for key, value in call.kwargs.items():
            if key in named - PACKING_KWARGS and value is not None and value is not False:
                raise ValueError(f"dispatch='device' takes no {key} while it follows a table")
        if table.count.device != x.device:
            raise ValueError(
                f"the mixer table must be on {x.device}, as hidden_states are, got "
                f"{table.count.device}"
            )
        (x,) = autocast(x)
        written = self._written_on(x.device)
        mixers: Any = tuple(self.mixers.values())
        extras = tuple(
            {**call.preprocessed_of(name), **packed_of(call, name, mixer)}
            for name, mixer in zip(self.names, mixers, strict=True)
        )
        return DeviceDispatch.apply(
            x,
            mixers,
            table.count[self.layer],
            table.samples[self.layer],
            written,
            extras,
            self.streams,
            *self.mixers.parameters(),
        )

    def _written_on(self, device: torch.device) -> Tensor:
        with torch.inference_mode(False):  # a later backward pass writes it
            if not isinstance(self.written, Tensor):
                self.written = torch.full((len(self.names),), self.written, dtype=torch.int32)
            self.written = self.written.to(device)
        return self.written

    def _let_autograd_add(self, name: str, device: torch.device) -> None:
        """Zero what device dispatch forgot of a mixer's gradients, and let it count as written."""
        if self.dispatch != "device":
            return
        written = self._written_on(device)[self.names.index(name)]
        for parameter in self.mixers[name].parameters():
            if parameter.grad is not None:
                parameter.grad.masked_fill_(written == 0, 0)
        written.clamp_(min=1)

    def _host(self, call: Call, table: MixerTable) -> Tensor:
        counts = table.count[self.layer].tolist()
        batch = call.hidden_states.shape[0]
        if sum(counts) != batch:
            raise ValueError(
                f"the mixer table gives {sum(counts)} of the {batch} samples of layer {self.layer} "
                "a mixer"
            )
        if batch in counts:
            return call.run(self.names[counts.index(batch)])
        rows = table.to(call.hidden_states.device).samples[self.layer].long()
        samples, parts = [], []
        for index, name in enumerate(self.names):
            if counts[index]:
                samples.append(rows[index, : counts[index]])
                parts.append(call.run(name, samples[-1]))
                if len(parts[-1]) != counts[index]:
                    raise ValueError(
                        f"mixer {name} made {len(parts[-1])} rows of {counts[index]} samples: name "
                        "arguments that have a row for each sample in batched_kwargs"
                    )
        return torch.cat(parts)[torch.cat(samples).argsort()]

    def _dense(self, call: Call, table: MixerTable) -> Tensor:
        row = table.to(call.hidden_states.device).table[self.layer]
        row = row.expand(call.hidden_states.shape[0])
        out, *others = (call.run(name, taken=row == i) for i, name in enumerate(self.names))
        for index, part in enumerate(others, 1):
            out = torch.where((row == index)[:, None, None], part, out)
        return out

    def _check_table(self, table: MixerTable, batch: int) -> None:
        layers, mixers, samples = table.samples.shape
        if (mixers, samples) != (len(self.names), batch) or self.layer >= layers:
            raise ValueError(
                f"the mixer table is for {layers} layers, {mixers} mixers and {samples} samples, "
                f"got layer {self.layer}, {len(self.names)} mixers and a batch of {batch}"
            )

    def _check_routed(self) -> None:
        made_of = [part for mixer in self.mixers.values() for part in parts_of(mixer)]
        if [*map(id, made_of)] == [*map(id, self._checked)]:
            return
        for name, mixer in self.mixers.items():
            check_routed(name, mixer)
        refuse_shared_within(dict(self.mixers.items()))
        self._checked = made_of

    def _check_name(self, key: str, name: str) -> None:
        if name not in self.names:
            raise ValueError(f"{key} takes one of the mixers {list(self.names)}, got {name!r}")


def packed_of(call: Call, name: str, mixer: RoutedMixer) -> dict[str, Tensor]:
    """What padding or packed sequences are to the named mixer, found without asking the device."""
    told = {**call.kwargs, **call.preprocessed.get(name, {})}
    packing = packing_of(call.hidden_states, left=mixer.left, waits=False, **told)
    if packing is None:
        return {}
    if mixer.left is None:
        return {"seq_idx": packing.seq_idx}
    return {"bounds": packing.bounds}


def parts_of(mixer: nn.Module) -> Iterator[Any]:
    """Objects that are the same ones as long as a check of a mixer for device dispatch holds."""
    for module in mixer.modules():
        yield from (module, type(module), vars(module).get("forward"))
        yield from (bool(module._forward_hooks), bool(module._forward_pre_hooks))
        for parameter in module._parameters.values():
            yield from (parameter, parameter is not None and parameter.requires_grad)


def in_backward() -> bool:
    """Whether autograd is running, as it is where checkpointing runs a forward pass again."""
    return torch._C._current_graph_task_id() != -1
