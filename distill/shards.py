"""What a rank holds of the student's fp32 weights and of AdamW's moments, and which elements of which parameter it is.

DeepSpeed keeps both in flat tensors, in a different way at each ZeRO stage; its own checkpoints fit the layout of ranks
that wrote them alone, and are pickles. Told by segments, the same tensors can be read on any layout.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.checkpoint.affine import ParamAffineMap
from deepspeed.checkpoint.constants import UNIVERSAL_CHECKPOINT_INFO
from torch import Tensor

# Of the loss scaler: what changes while training.
_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_COUNTERS = ("global_steps", "global_samples", "skipped_steps")


@dataclass(frozen=True)
class Segment:
    """Neighbouring elements of one parameter in one of a rank's flat tensors."""

    name: str
    """The parameter."""
    part: int
    """The tensor-parallel part of it that `start` counts in; 0 where it has none."""
    start: int
    length: int
    flat: int
    """Which flat tensor."""
    offset: int
    """Where in it."""


@dataclass(frozen=True)
class Parts:
    """How tensor parallelism has dealt out a parameter: the same description on every rank."""

    pieces: dict[str, Any]
    """DeepSpeed's description of how the parts make the whole."""

    @property
    def _map(self) -> ParamAffineMap:
        return ParamAffineMap.from_dict(self.pieces)

    def sizes(self) -> list[int]:
        """Elements of each part."""
        shapes = self._map.shard_shapes
        return [_product(shapes[rank]) for rank in sorted(shapes)]

    def whole(self, parts: Sequence[Tensor]) -> Tensor:
        """The flattened parameter, of its flattened parts."""
        described = self._map
        shaped = {rank: part.view(described.shard_shapes[rank]) for rank, part in enumerate(parts)}
        whole: Tensor = described.rebuild(shaped)
        return whole.flatten()

    def part(self, whole: Tensor, number: int) -> Tensor:
        """One part of the flattened parameter, flattened."""
        part: Tensor = self._map.extract(whole, number)
        return part.flatten()


class Shards:
    """The flat tensors of an engine's optimizer on this rank."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, tp_rank: int):
        self._engine, self._tp_rank = engine, tp_rank
        self._zero: Any = engine.optimizer
        self._adam: Any = getattr(self._zero, "optimizer", self._zero)
        self._names: dict[Any, str] = engine.param_names
        info = getattr(engine.module, UNIVERSAL_CHECKPOINT_INFO, None) or {}
        self._pieces: dict[str, dict[str, Any]] = info.get("affine_map", {}).get("params", {})
        self._groups, self.flats, self._publish = self._parts_of(self._zero)
        self.segments = [segment for flat, group in enumerate(self._groups) for segment in self._cut(flat, group)]
        if any(segment.offset + segment.length > self.flats[segment.flat].numel() for segment in self.segments):
            raise NotImplementedError("DeepSpeed keeps the optimizer's state where it cannot be saved from")

    def _parts_of(self, zero: Any) -> tuple[list[list[Any]], list[Tensor], Callable[[], None]]:
        """Parameters by flat tensor, the flat tensors, and what brings these into the weights of the model."""
        if hasattr(zero, "fp32_partitioned_groups_flat"):
            return zero.fp16_groups, zero.fp32_partitioned_groups_flat, self._publish_zero3
        if hasattr(zero, "single_partition_of_fp32_groups"):
            return zero.round_robin_bit16_groups, zero.single_partition_of_fp32_groups, zero.update_lp_params
        if hasattr(zero, "fp32_groups_flat_partition"):
            return zero.bf16_groups, zero.fp32_groups_flat_partition, zero.update_lp_params
        if hasattr(zero, "fp32_groups_flat"):
            flats = zero.fp32_groups_flat
            return zero.fp16_groups, flats, lambda: _copy_all(zero.fp16_groups_flat, flats)
        masters = [p for group in self._adam.param_groups for p in group["params"]]
        weights = [p for group in getattr(zero, "fp16_groups", [masters]) for p in group]
        return [[p] for p in weights], masters, lambda: _copy_all(weights, masters)

    def _publish_zero3(self) -> None:
        zero = self._zero
        for flat, weights in zip(zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat, strict=True):
            weights.data.copy_(flat.data)
        for weights, shards in zip(zero.fp16_partitioned_groups_flat, zero.fp16_partitioned_groups, strict=True):
            for shard, updated in zip(shards, zero.unflatten(weights, shards), strict=True):
                shard.data = updated.data

    def _cut(self, flat: int, group: list[Any]) -> Iterator[Segment]:
        if hasattr(self._zero, "fp32_partitioned_groups_flat"):
            yield from self._cut_one_by_one(flat, group)
        else:
            yield from self._cut_in_a_row(flat, group)

    def _cut_one_by_one(self, flat: int, group: list[Any]) -> Iterator[Segment]:
        """ZeRO-3 cuts each parameter over the ranks by itself; the last cuts may be padded."""
        offset = 0
        for p in group:
            size = p.partition_numel()
            start = dist.get_rank(p.ds_process_group) * size
            if (length := min(size, p.ds_numel - start)) > 0:
                yield self._segment(p, start, length, flat, offset)
            offset += size

    def _cut_in_a_row(self, flat: int, group: list[Any]) -> Iterator[Segment]:
        """Elsewhere parameters lie one behind the other in a tensor that may be cut over the ranks."""
        size = self.flats[flat].numel()
        groups = getattr(self._zero, "real_dp_process_group", None)
        first, at = (dist.get_rank(groups[flat]) * size if groups else 0), 0
        given = getattr(self._zero, "round_robin_bit16_offsets", None)
        for number, p in enumerate(group):
            at = given[flat][number] if given else at
            begin, end = max(at, first), min(at + p.numel(), first + size)
            if begin < end:
                yield self._segment(p, begin - at, end - begin, flat, begin - first)
            at += p.numel()

    def _segment(self, p: Any, start: int, length: int, flat: int, offset: int) -> Segment:
        name = self._names[p]
        return Segment(name, self._tp_rank if self.parts(name) else 0, start, length, flat, offset)

    def parts(self, name: str) -> Parts | None:
        """How tensor parallelism has dealt out a parameter; None where every rank's replica has it whole."""
        pieces = self._pieces.get(f"^{re.escape(name)}$")
        # DeepSpeed gives a parameter that is not dealt out no shape.
        return Parts(pieces) if pieces and _product(pieces["logical_shape"]) else None

    def tensors(self) -> dict[str, Tensor]:
        """The flat tensors and their moments, live, by name; `I.fp32` is flat tensor I."""
        found: dict[str, Tensor] = {}
        for index, flat in enumerate(self.flats):
            state = self._adam.state[flat].items()
            kept = {name: value for name, value in state if isinstance(value, Tensor) and value.ndim}
            found |= {f"{index}.{name}": value for name, value in ({"fp32": flat} | kept).items()}
        return found

    def put(self, index: int, name: str, value: Tensor) -> None:
        """Give flat tensor `index` its values (`name` fp32) or a moment."""
        flat, state = self.flats[index], self._adam.state[self.flats[index]]
        if name == "fp32":
            flat.data.copy_(value)
        elif isinstance(state.get(name), Tensor):
            state[name].copy_(value)
        else:
            state[name] = value.to(flat.device, copy=True)

    def notes(self) -> dict[str, Any]:
        """All else that a step changes, as JSON knows it; the same on every rank but for the segments."""
        scheduler = self._engine.lr_scheduler
        return {
            "segments": [list(asdict(segment).values()) for segment in self.segments],
            "parts": {s.name: parts.pieces for s in self.segments if (parts := self.parts(s.name)) is not None},
            # FusedAdam counts for the last parameter of a group alone.
            "steps": max((int(self._adam.state[flat].get("step", 0)) for flat in self.flats), default=0),
            "groups": [_simple(group) for group in self._adam.param_groups],
            "schedule": _simple(scheduler.state_dict()),
            "scale": {name: getattr(self._scaler, name) for name in _SCALE if hasattr(self._scaler, name)},
            "counters": {name: getattr(self._engine, name) for name in _COUNTERS},
        }

    def take_notes(self, notes: dict[str, Any]) -> None:
        """Put back what `notes` gave."""
        self._count_to(notes["steps"])
        for group, saved in zip(self._adam.param_groups, notes["groups"], strict=True):
            # FusedAdam's count. The rest is the recipe's.
            if "step" in saved:
                group["step"] = saved["step"]
        self._schedule_from(notes["schedule"])
        for name, value in notes["scale"].items() if self._scaler else ():
            setattr(self._scaler, name, value)
        for name, value in notes["counters"].items():
            setattr(self._engine, name, value)

    def _schedule_from(self, saved: dict[str, Any]) -> None:
        """Let the schedule have made as many steps as `saved`; the rates are the recipe's at that step.

        The saved rates may be those of another schedule, since `optim.steps` may change. LambdaLR would keep them for
        one more step.
        """
        scheduler = self._engine.lr_scheduler
        for name in ("last_epoch", "_step_count"):
            setattr(scheduler, name, saved[name])
        factors = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        scheduler._last_lr = [peak * factor(scheduler.last_epoch) for peak, factor in factors]
        for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
            group["lr"] = rate

    def _count_to(self, steps: int) -> None:
        """Let AdamW have made so many steps."""
        if not steps:
            return  # nor has it moments: a state of a count alone would be taken for a whole one
        for flat in self.flats:
            self._adam.state[flat]["step"] = self._count(steps, flat.device)
        if hasattr(self._adam, "ds_opt_adam"):
            # DeepSpeed's on the host multiplies its powers of β as it goes, and takes others, a bit off, after a leap.
            group, nothing = self._adam.param_groups[0], [torch.zeros(1) for _ in range(4)]
            given = group["lr"], *group["betas"], group["eps"], 0.0, True
            for step in range(1, steps + 1):
                for _ in self.flats:
                    self._adam.ds_opt_adam.adam_update(self._adam.opt_id, step, *given, *nothing)

    def _count(self, steps: int, device: torch.device) -> Tensor | int:
        """A count of steps as the optimizer keeps it; torch's is a tensor, on the device where kernels are fused."""
        if not isinstance(self._adam, torch.optim.AdamW):
            return steps
        fused = any(group.get("fused") for group in self._adam.param_groups)
        return torch.tensor(float(steps), device=device if fused else "cpu")

    @property
    def _scaler(self) -> Any:
        """fp16's, which at stage 0 is of another class."""
        return getattr(self._zero, "loss_scaler", None) or getattr(self._zero, "loss_scale_config", None)

    def publish(self) -> None:
        """Bring the flat tensors into the weights of the model. Collective."""
        self._publish()


def _simple(values: dict[str, Any]) -> dict[str, Any]:
    """Numbers, and lists of them."""

    def is_simple(value: Any) -> bool:
        if isinstance(value, (list, tuple)):
            return all(map(is_simple, value))
        return isinstance(value, (bool, int, float))

    return {name: value for name, value in values.items() if name != "params" and is_simple(value)}


def _product(shape: Sequence[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        if target is not source:
            target.data.copy_(source.data)
