"""Masters and moments between checkpoints and DeepSpeed's partitions: fragments <-> ZeRO.

Under ZeRO the optimizer steps one flat fp32 partition for each of its groups; each parameter's
`_hp_mapping` says which part of it this rank owns, and where in the partition it lies. Stage 0 has
neither: every rank's optimizer steps the whole parameters.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint.reader import Checkpoint, Fragment
from pretrain.modeling_tablefree import checkpoint_parameters

STATES = ("master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the part of a parameter lies that this rank owns."""

    flat: Tensor  # what the optimizer steps: a partition, or the parameter itself
    first: int  # element of the parameter with which the part begins
    start: int  # element of `flat` with which it begins
    count: int  # elements


class ZeroState:
    """The part of a run's state that this rank owns, as views of what DeepSpeed's engine holds."""

    def __init__(self, engine: Any, optimizer: torch.optim.Optimizer, *, is_main: bool) -> None:
        self.engine = engine
        self.optimizer = optimizer
        self.has_partitions = bool(engine.zero_optimization())
        # At stage 0 all ranks hold the same, and one of them saves it.
        self.saves = self.has_partitions or is_main

    def owned(self) -> Iterator[Fragment]:
        """Fp32 views of the part of each parameter that this rank owns."""
        for name, parameter in checkpoint_parameters(self.engine.module.model):
            place = self._place_of(parameter)
            if place is None:
                continue
            moments = self.optimizer.state[place.flat] or self._moments(place.flat, steps=0)
            state = {"master": place.flat, **moments}
            views = {
                key: state[key].detach().flatten().narrow(0, place.start, place.count)
                for key in STATES
            }
            yield Fragment(name=name, start=place.first, states=views)

    def _place_of(self, parameter: Tensor) -> Place | None:
        """Where this rank's part of a parameter lies; None: it owns nothing of it."""
        if not self.has_partitions:
            return Place(flat=parameter, first=0, start=0, count=parameter.numel())
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        part = mapping.hp_fragment_address
        return Place(
            flat=self.optimizer.param_groups[mapping.param_group_index]["params"][0],
            first=mapping.lp_fragment_address.start,
            start=part.start,
            count=part.numel,
        )

    def _moments(self, flat: Tensor, steps: int) -> dict[str, Tensor]:
        """Fresh optimizer state of a partition, as after so many steps, to be filled."""
        moments = {
            "step": torch.tensor(float(steps), device=flat.device),
            "exp_avg": torch.zeros_like(flat),
            "exp_avg_sq": torch.zeros_like(flat),
        }
        self.optimizer.state[flat] = moments
        return moments

    def read(self) -> tuple[list[Fragment], int]:
        """This rank's fragments of masters and moments, and the number of optimizer steps taken."""
        owned = list(self.owned())  # also where it is not saved: it makes moments that lack
        steps = {int(state["step"]) for state in self.optimizer.state.values()}
        assert len(steps) == 1, f"parameter groups took different numbers of steps: {steps}"
        return owned if self.saves else [], steps.pop()

    def write(self, checkpoint: Checkpoint) -> None:
        """Fill this rank's fragments from a checkpoint saved at any world size and stage."""
        for group in self.optimizer.param_groups:
            for flat in group["params"]:
                self._moments(flat, checkpoint.manifest.optimizer_step)
        for fragment in self.owned():
            for state, view in fragment.states.items():
                view.copy_(checkpoint.read(fragment.name, state, fragment.start, view.numel()))
        if self.has_partitions:
            self.engine.optimizer.update_lp_params()
