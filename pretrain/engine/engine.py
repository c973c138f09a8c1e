"""The engine: a model under DeepSpeed's ZeRO, its step, and what its ranks agree on in a step.

What it is configured with comes from pretrain/config/deepspeed.py. Where it touches DeepSpeed's
internals stands in pretrain/engine/deepspeed_hooks.py and pretrain/engine/zero_state.py.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_prep.shards import Tokens
from pretrain.checkpoint.reader import Checkpoint, Fragment
from pretrain.config.recipe import Recipe
from pretrain.data.batches import widened
from pretrain.distributed.agree import gather
from pretrain.distributed.world import World
from pretrain.engine.clock import PAUSE, StepClock, peak_memory_bytes
from pretrain.engine.deepspeed_hooks import (
    have_norm_read,
    have_updates_asked_for,
    norm_before_update,
)
from pretrain.engine.deepspeed_library import initialise
from pretrain.engine.exchange import HostFigures, RankReport, StepExchange
from pretrain.engine.figures import StepFigures, no_number
from pretrain.engine.optim import build_optimizer
from pretrain.engine.zero_state import ZeroState
from pretrain.metrics.step_record import RankFigures
from pretrain.model.loss import LanguageModelLoss
from pretrain.modeling_tablefree import TableFreeForCausalLM, checkpoint_parameters

SAVE_FAILED = 1000  # beside the numbers of signals, why a run is to end: the writer will say more

# From loss and gradient norm, alike on every rank: why not to take the update, or None.
Judge = Callable[[float, float], str | None]


class Engine:
    """A model under ZeRO: takes token ids, trains, and gives and takes its state as fragments."""

    def __init__(
        self,
        model: TableFreeForCausalLM,
        recipe: Recipe,
        config: dict[str, Any],
        world: World,
        device: torch.device,
    ) -> None:
        """`config` is the merged DeepSpeed configuration, `device` that of the process group.

        Raises UserError for a configuration that DeepSpeed refuses. Where the recipe masks
        documents, `mask_documents` is to follow.
        """
        self.recipe = recipe
        # Says before each update why not to take it. A run may set another at any time.
        self.judge: Judge = no_number
        self.world = world
        self.device = device
        self.accumulation_steps = int(config["gradient_accumulation_steps"])
        self.module = LanguageModelLoss(model, recipe.loss_head).to(device)
        self.optimizer = build_optimizer(self.module, recipe.optimizer)
        self.deepspeed = initialise(self.module, self.optimizer, config)
        self.clock = StepClock(device)
        # Why this rank wants the run to end, a signal's number or SAVE_FAILED; 0: it does not. Set
        # it at any time.
        self.wants_end = 0
        # The largest of all ranks' when the last step was exchanged, the same one on every rank.
        self.ends = 0
        self.zero_state = ZeroState(self.deepspeed, self.optimizer, is_main=world.is_main)
        self._exchange = StepExchange(world, device)
        self._loss_sum = torch.zeros((), dtype=torch.float32, device=device)
        self._figures: StepFigures | None = None  # of the step under way, once it was read
        self._last_step: RankFigures | None = None  # this rank's
        have_norm_read(self.deepspeed, recipe.optimizer.gradient_clipping, self._norm_as_read)
        have_updates_asked_for(self.optimizer, self._may_update)

    @property
    def dtype(self) -> torch.dtype:
        """In which the model multiplies."""
        return next(self.module.parameters()).dtype

    def mask_documents(self, eos_id: int) -> None:
        """Where the recipe says so, let no token see another document; `eos_id` ends each."""
        if self.recipe.intra_document_masking:
            self.module.eos_id = eos_id

    def to_device(self, wide: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets, (B, T) each, of windows of int64 ids, (B, T + 1)."""
        wide_BT = wide.to(self.device, non_blocking=True)
        return wide_BT[:, :-1], wide_BT[:, 1:]

    def train_step(self, micro_batches: Sequence[Tensor], learning_rate: float) -> StepFigures:
        """One optimizer step over this rank's micro-batches, as StepBatches gives them.

        1. Each micro-batch forward and backward; DeepSpeed sums the gradients.
        2. In the last `deepspeed.step()`, once the gradients' norm is known, DeepSpeed calls
           `_norm_as_read`: loss, norm and each rank's figures are exchanged, and the judge asked.
        3. DeepSpeed clips by that norm, and asks `_may_update` before the optimizer updates.

        A no-op where the judge refuses it, which the figures say.
        """
        if self.recipe.intra_document_masking and self.module.eos_id is None:
            raise ValueError("the recipe masks documents: call mask_documents before a step")
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        self.deepspeed.train()
        self._figures = None
        self._loss_sum = torch.zeros((), dtype=torch.float32, device=self.device)
        for wide in micro_batches:
            loss = self.deepspeed(*self.to_device(wide))
            self.clock.mark("forward")
            self.deepspeed.backward(loss)
            self._loss_sum += loss.detach()
            self.clock.mark("backward")
            self.deepspeed.step()
        # Where DeepSpeed itself finds the gradients to be no numbers, it asks for no update.
        figures = self._figures or self._read_before_update(math.inf)
        self.clock.mark("optimizer")
        return figures

    def _read_before_update(self, norm: Tensor | float) -> StepFigures:
        """What this step gave, and what is thought of it, before DeepSpeed clips and updates."""
        self.clock.mark("backward")
        host = HostFigures(last_step=self._last_step, wants_end=self.wants_end)
        reports = self._exchange.gather(self._loss_sum, norm, host)
        self.ends = max(report.host.wants_end for report in reports)
        self._last_step = RankFigures(
            rank=self.world.rank,
            seconds=self.clock.split(),
            peak_memory_bytes=peak_memory_bytes(self.device),
        )
        # In fp32, as the losses are.
        loss_sum = torch.tensor([report.loss_sum for report in reports], dtype=torch.float32).sum()
        loss = float(loss_sum) / (self.accumulation_steps * self.world.world_size)
        gradient_norm = norm_of(reports)
        self._figures = StepFigures(
            loss=loss,
            gradient_norm=gradient_norm,
            own=self._last_step,
            slowest=slowest_of(reports),
            refused=self.judge(loss, gradient_norm),
        )
        return self._figures

    def _norm_as_read(self, norm: Tensor | float) -> Tensor:
        """The norm, after it was read, for DeepSpeed to clip by."""
        return torch.tensor(self._read_before_update(norm).gradient_norm, dtype=torch.float32)

    def _may_update(self) -> bool:
        """Whether the step under way is to reach weights and moments."""
        figures = self._figures or self._read_before_update(norm_before_update(self.deepspeed))
        return figures.refused is None

    def row_nats(self, micro_batches: Sequence[Tensor]) -> list[float]:
        """Mean cross-entropy in nats of every row of the global batch, in order.

        The weights are as they are now.
        """
        self.deepspeed.eval()
        own = [
            self.module.nats(*self.to_device(wide)).mean(dim=1).tolist() for wide in micro_batches
        ]
        of_ranks = gather(own)
        # Row by row as `rows_of` deals them out: micro-step by micro-step, in each rank by rank.
        rows: list[float] = []
        for micro_step in range(self.accumulation_steps):
            for of_rank in of_ranks:
                rows += of_rank[micro_step]
        return rows

    def mean_nats(self, batches: Iterator[Tokens]) -> float:
        """Mean cross-entropy over the targets of all ranks' batches, in nats."""
        self.deepspeed.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)  # of nats, and of targets
        for ids in batches:
            inputs_BT, targets_BT = self.to_device(widened(ids, pinned=self.device.type == "cuda"))
            sums[0] += self.module.nats(inputs_BT, targets_BT).sum(dtype=torch.float64)
            sums[1] += targets_BT.numel()
            self.clock.mark(PAUSE)
        dist.all_reduce(sums)
        return float(sums[0] / sums[1])

    def parameter_shapes(self) -> dict[str, list[int]]:
        """Every trained parameter's name, as in checkpoints, and shape."""
        return {
            name: list(parameter.shape)
            for name, parameter in checkpoint_parameters(self.module.model)
        }

    def read_state(self) -> tuple[list[Fragment], int]:
        """This rank's fragments of masters and moments, and the number of optimizer steps taken."""
        return self.zero_state.read()

    def write_state(self, checkpoint: Checkpoint) -> None:
        """Fill this rank's fragments from a checkpoint saved at any world size and stage."""
        self.zero_state.write(checkpoint)


def norm_of(reports: Sequence[RankReport]) -> float:
    """The one gradient norm of a step, whatever happens on one rank.

    Infinity stands for what is no number.
    """
    norms = [report.gradient_norm for report in reports]
    # DeepSpeed says -1 where it met infinities; a comparison with NaN is false.
    if all(norm >= 0 for norm in norms):
        return max(norms)
    return math.inf


def slowest_of(reports: Sequence[RankReport]) -> RankFigures | None:
    """Whose data and forward pass, where no rank waits for another, took longest a step ago.

    None at the first step.
    """
    steps = [report.host.last_step for report in reports if report.host.last_step is not None]
    if not steps:
        return None
    return max(steps, key=lambda step: step.seconds["data"] + step.seconds["forward"])
