"""What the ranks tell each other amid a step, in one collective and as one row of numbers each."""

from dataclasses import dataclass
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.distributed.world import World
from pretrain.engine.clock import PHASES
from pretrain.metrics.step_record import RankFigures


@dataclass(frozen=True, kw_only=True)
class HostFigures:
    """What a rank's host knows before the device has got so far."""

    last_step: RankFigures | None  # of the step before; None at the first
    wants_end: int  # why this rank wants the run to end, or 0

    def pack(self) -> list[float]:
        """As numbers: seconds of each of PHASES, bytes, the reason."""
        if self.last_step is None:
            return [0.0] * (len(PHASES) + 1) + [self.wants_end]
        seconds = [self.last_step.seconds[phase] for phase in PHASES]
        return [*seconds, self.last_step.peak_memory_bytes, self.wants_end]

    @classmethod
    def unpack(cls, numbers: list[float], rank: int) -> Self:
        """What another rank packed."""
        *seconds, peak_memory_bytes, wants_end = numbers
        last_step = RankFigures(
            rank=rank,
            seconds=dict(zip(PHASES, seconds, strict=True)),
            peak_memory_bytes=int(peak_memory_bytes),
        )
        # A step takes memory: without any, there was none.
        return cls(last_step=last_step if peak_memory_bytes else None, wants_end=int(wants_end))


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """What one rank says of a step before its update."""

    loss_sum: float  # nats, over its micro-batches, fp32
    gradient_norm: float  # of all ranks' parameters; below 0, or no number, where one overflowed
    host: HostFigures


class StepExchange:
    """The one place in a step where the host waits for the device."""

    def __init__(self, world: World, device: torch.device) -> None:
        self.world_size = world.world_size
        self.device = device
        numbers = torch.zeros(len(PHASES) + 2, dtype=torch.float64)
        # From pinned memory a GPU copies without the host's waiting.
        self._host = numbers.pin_memory() if device.type == "cuda" else numbers

    def gather(
        self, loss_sum: Tensor, gradient_norm: Tensor | float, host: HostFigures
    ) -> list[RankReport]:
        """Every rank's report, in rank order, on every rank."""
        norm = torch.as_tensor(gradient_norm, dtype=torch.float32, device=self.device).view(())
        self._host.copy_(torch.tensor(host.pack(), dtype=torch.float64))
        from_device = torch.stack([loss_sum, norm]).double()
        own = torch.cat([from_device, self._host.to(self.device, non_blocking=True)])
        of_ranks = own.new_empty(self.world_size * len(own))
        dist.all_gather_into_tensor(of_ranks, own)
        reports = []
        for rank, row in enumerate(of_ranks.view(self.world_size, -1).tolist()):
            loss, norm_there, *numbers = row
            there = HostFigures.unpack(numbers, rank)
            reports.append(RankReport(loss_sum=loss, gradient_norm=norm_there, host=there))
        return reports
