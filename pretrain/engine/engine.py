"""The DeepSpeed engine: the only module that imports deepspeed, and all that touches its internals.

What it is configured with comes from pretrain/config/deepspeed.py.
"""

import contextlib
import importlib
import logging
import math
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pydantic
import torch
import torch.distributed as dist
from torch import Tensor

from data_prep.errors import UserError, first_problem, one_line
from data_prep.shards import Tokens
from pretrain.checkpoint.reader import Checkpoint, Fragment
from pretrain.config.recipe import Recipe
from pretrain.distributed.agree import gather
from pretrain.distributed.rendezvous import set_rendezvous
from pretrain.distributed.world import World
from pretrain.engine.clock import PAUSE, PHASES, StepClock, peak_memory_bytes
from pretrain.engine.figures import RankFigures, StepFigures, no_number
from pretrain.engine.optim import build_optimizer
from pretrain.model.loss import LanguageModelLoss
from pretrain.modeling_tablefree import TableFreeForCausalLM, checkpoint_parameters

if not torch.accelerator.is_available():
    # said, not guessed: DeepSpeed warns when it has to guess
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import compiler

SAVE_FAILED = 1000  # beside the numbers of signals, why a run is to end: the writer will say more
STATES = ("master", "exp_avg", "exp_avg_sq")


def start_process_group(world: World) -> torch.device:
    """Join the other ranks, unless that is done; returns this rank's device."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # of DeepSpeed's calls
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # DeepSpeed would ask a compiler about each of its extensions, for a second, and compile one on
    # a CPU, for a minute, or hang on the lock of a killed build. None is needed.
    deepspeed.ops.__compatible_ops__ = {}
    import_muon_uncompiled()
    set_rendezvous(world)
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        accelerator.set_device(world.local_rank)
    try:
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    except dist.DistError as error:  # after DEEPSPEED_TIMEOUT minutes, 10 unless set
        why = (
            f"another rank failed before all had met, or cannot reach this one ({one_line(error)})"
        )
        raise SystemExit(f"error: rank {world.rank} ({socket.gethostname()}): {why}") from None
    return torch.device(accelerator.current_device_name())


def import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon, which it asks every optimizer about, without torch's compiler.

    Its functions are handed to torch.compile as the module is imported, and that loads the whole
    compiler: 1.1 of the 5.6 s of CPU time from a command to its first step
    (tests/benchmarks/first_step.py). No recipe trains with DeepSpeed's Muon.
    """
    as_it_was = compiler.compile
    compiler.compile = lambda: compiler.dummy_decorator
    try:
        with contextlib.suppress(ImportError):  # as DeepSpeed itself does without it
            importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = as_it_was


def leave_process_group() -> None:
    """Leave the other ranks, once all have come so far."""
    if dist.is_initialized():
        gather(None)
        dist.destroy_process_group()


class Engine:
    """A model under ZeRO: takes token ids, trains, and gives and takes its state as fragments."""

    def __init__(
        self,
        model: TableFreeForCausalLM,
        recipe: Recipe,
        config: dict[str, Any],
        world: World,
        device: torch.device,
        eos_id: int | None = None,
        judge: Callable[[float, float], str | None] = no_number,
    ) -> None:
        """`judge` sees loss and gradient norm before each update, alike on every rank, and says
        why not to take it.
        """
        self.recipe = recipe
        self.judge = judge
        self.world = world
        self.device = device
        self.accumulation_steps = int(config["gradient_accumulation_steps"])
        module = LanguageModelLoss(
            model, recipe.loss_head, eos_id if recipe.intra_document_masking else None
        )
        self.optimizer = build_optimizer(module.to(device), recipe.optimizer)
        try:
            self.deepspeed, *_ = deepspeed.initialize(
                model=module, optimizer=self.optimizer, config=config, dist_init_required=False
            )
        except pydantic.ValidationError as error:
            raise UserError(f"the DeepSpeed configuration: {first_problem(error, str)}") from None
        except (AssertionError, ImportError, NotImplementedError, ValueError) as error:
            raise UserError(f"the DeepSpeed configuration: {error}") from error
        self.clock = StepClock(device)
        # Why this rank wants the run to end, a signal's number or SAVE_FAILED; 0: it does not. Set
        # it at any time.
        self.wants_end = 0
        # the largest of all ranks' when the last step was exchanged, the same one on every rank
        self.ends = 0
        # this rank's seconds and memory; wants_end
        last_step = torch.zeros(len(PHASES) + 2, dtype=torch.float64)
        self._last_step = last_step.pin_memory() if device.type == "cuda" else last_step
        self._figures: StepFigures | None = None
        self._have_norm_read()
        self._have_refused_steps_update_nothing()

    def rows_of(self, micro_step: int) -> slice:
        """Which rows of the global batch this rank takes in a micro-step."""
        size = self.recipe.batch.micro_batch_size
        start = (micro_step * self.world.world_size + self.world.rank) * size
        return slice(start, start + size)

    def pinned(self, ids: Tokens) -> Tensor:
        """Ids widened to int64, in memory from which a GPU copies without the host's waiting.

        All ids up to 65,535 are ordinary: uint16 widens before torch sees it.
        """
        wide = torch.from_numpy(ids.astype("int64"))
        return wide.pin_memory() if self.device.type == "cuda" else wide

    def to_device(self, wide: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of windows of int64 ids."""
        wide_BT = wide.to(self.device, non_blocking=True)
        return wide_BT[:, :-1], wide_BT[:, 1:]

    def train_step(self, micro_batches: list[Tensor], learning_rate: float) -> StepFigures:
        """One optimizer step over this rank's micro-batches, as `pinned` gives them; a no-op
        where it is refused.
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        self.deepspeed.train()
        self._figures = None
        self._loss = torch.zeros((), dtype=torch.float32, device=self.device)
        for wide in micro_batches:
            loss = self.deepspeed(*self.to_device(wide))
            self.clock.mark("forward")
            self.deepspeed.backward(loss)
            self._loss += loss.detach()
            self.clock.mark("backward")
            self.deepspeed.step()
        # DeepSpeed passed over it before it was asked
        figures = self._figures or self._read_before_update(math.inf)
        self.clock.mark("optimizer")
        return figures

    def _read_before_update(self, norm: Tensor | float) -> StepFigures:
        """Note what this step gave, and what is thought of it, just before DeepSpeed clips and
        updates.
        """
        self.clock.mark("backward")
        losses, norms, last_steps = self._synchronise(norm).split(
            [1, 1, len(self._last_step)], dim=1
        )
        loss = float(losses.float().sum()) / (self.accumulation_steps * self.world.world_size)
        # the same norm on every rank, whatever happens on one; DeepSpeed says -1 for what is no
        # number
        gradient_norm = float(norms.max()) if norms.min() >= 0 else math.inf
        seconds, peak = self.clock.split(), peak_memory_bytes(self.device)
        own = RankFigures(rank=self.world.rank, seconds=seconds, peak_memory_bytes=peak)
        self.ends = int(last_steps[:, -1].max())
        rank = int(last_steps[:, :2].sum(dim=1).argmax())
        *theirs, peak, _ = last_steps[rank].tolist()
        slowest = RankFigures(
            rank=rank, seconds=dict(zip(PHASES, theirs, strict=True)), peak_memory_bytes=int(peak)
        )
        refused = self.judge(loss, gradient_norm)
        self._figures = StepFigures(
            loss=loss,
            gradient_norm=gradient_norm,
            own=own,
            slowest=slowest if peak else None,
            refused=refused,
        )
        self._last_step[:-1] = torch.tensor(
            [*own.seconds.values(), own.peak_memory_bytes], dtype=torch.float64
        )
        return self._figures

    def _synchronise(self, norm: Tensor | float) -> Tensor:
        """The one place in a step where the host waits for the device.

        For each rank the sum of its losses, the gradient norm, the seconds of PHASES and the memory
        of its last step, and why it wants the run to end.
        """
        self._last_step[-1] = self.wants_end
        norm = torch.as_tensor(norm, dtype=torch.float32, device=self.device).view(())
        figures = torch.stack([self._loss, norm]).double()
        own = torch.cat([figures, self._last_step.to(self.device, non_blocking=True)])
        of_ranks = own.new_empty(self.world.world_size * len(own))
        dist.all_gather_into_tensor(of_ranks, own)
        return of_ranks.cpu().view(self.world.world_size, -1)

    def row_nats(self, micro_batches: list[Tensor]) -> list[float]:
        """Mean cross-entropy in nats of every row of the global batch, in order, with the
        weights as they are now.
        """
        self.deepspeed.eval()
        own = [
            self.deepspeed.module.nats(*self.to_device(wide)).mean(dim=1).tolist()
            for wide in micro_batches
        ]
        of_ranks = gather(own)
        return [
            nats for i in range(self.accumulation_steps) for rank in of_ranks for nats in rank[i]
        ]

    def mean_nats(self, batches: Iterator[Tokens]) -> float:
        """Mean cross-entropy over the targets of all ranks' batches, in nats."""
        self.deepspeed.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for ids in batches:
            inputs, targets = self.to_device(self.pinned(ids))
            sums[0] += self.deepspeed.module.nats(inputs, targets).sum(dtype=torch.float64)
            sums[1] += targets.numel()
            self.clock.mark(PAUSE)
        dist.all_reduce(sums)
        return float(sums[0] / sums[1])

    def parameter_shapes(self) -> dict[str, list[int]]:
        """Every trained parameter's name, as in checkpoints, and shape."""
        return {
            name: list(parameter.shape)
            for name, parameter in checkpoint_parameters(self.deepspeed.module.model)
        }

    # What follows knows DeepSpeed's internals. Under ZeRO the optimizer steps one flat fp32
    # partition for each of its groups; each parameter's `_hp_mapping` says which part of it this
    # rank owns, and where in the partition it lies. Stage 0 has neither: every rank's optimizer
    # steps the whole parameters.

    def _have_norm_read(self) -> None:
        """Have `_read_before_update` see each step's gradient norm, wherever the stage's
        optimizer has it.
        """
        zero = self.deepspeed.optimizer
        if hasattr(zero, "scaled_global_norm"):
            gradient_norm = zero.scaled_global_norm
            zero.scaled_global_norm = lambda: self._read(gradient_norm())
        elif not self.deepspeed.zero_optimization():  # DeepSpeed's own clipping forgets the norm
            parameters, limit = (
                list(self.deepspeed.module.parameters()),
                self.recipe.optimizer.gradient_clipping,
            )
            clip = torch.nn.utils.clip_grad_norm_
            self.deepspeed.clip_fp32_gradients = lambda: self._read(clip(parameters, limit))

    def _read(self, norm: Tensor | float) -> Tensor:
        """The norm, after it was read, for DeepSpeed to clip by."""
        return torch.tensor(self._read_before_update(norm).gradient_norm, dtype=torch.float32)

    def _have_refused_steps_update_nothing(self) -> None:
        """A refused step goes its way through DeepSpeed, which clears its gradients, but for the
        update itself.
        """
        update = self.optimizer.step

        def step() -> None:
            # BF16_Optimizer, which stage 1 gets in bf16, knows the norm by now
            if self._figures is None:
                self._read_before_update(self.deepspeed.optimizer._global_grad_norm)
            if self._figures and self._figures.refused is None:
                update()

        self.optimizer.step = step  # type: ignore[method-assign, assignment]

    def _owned(self) -> Iterator[tuple[str, int, dict[str, Tensor]]]:
        """Name, first element and fp32 views of the part of each parameter that this rank owns."""
        for name, parameter in checkpoint_parameters(self.deepspeed.module.model):
            flat, first, start, count = parameter, 0, 0, parameter.numel()
            if self.deepspeed.zero_optimization():
                mapping = parameter._hp_mapping  # type: ignore[attr-defined]
                if mapping is None:
                    continue
                flat = self.optimizer.param_groups[mapping.param_group_index]["params"][0]
                first = mapping.lp_fragment_address.start
                start, count = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
            state = {"master": flat, **(self.optimizer.state[flat] or self._moments(flat, steps=0))}
            yield (
                name,
                first,
                {key: state[key].detach().flatten().narrow(0, start, count) for key in STATES},
            )

    def _moments(self, flat: Tensor, steps: int) -> dict[str, Tensor]:
        """Fresh optimizer state of a partition, as after so many steps, to be filled."""
        self.optimizer.state[flat] = {
            "step": torch.tensor(float(steps), device=flat.device),
            "exp_avg": torch.zeros_like(flat),
            "exp_avg_sq": torch.zeros_like(flat),
        }
        return self.optimizer.state[flat]

    def read_state(self) -> tuple[list[Fragment], int]:
        """This rank's fragments of masters and moments, and the number of optimizer steps taken."""
        # at stage 0 all ranks hold the same
        owns = self.deepspeed.zero_optimization() or self.world.is_main
        fragments = [
            Fragment(name=name, start=start, states=views)
            for name, start, views in self._owned()
            if owns
        ]
        steps = {int(state["step"]) for state in self.optimizer.state.values()}
        assert len(steps) == 1, f"parameter groups took different numbers of steps: {steps}"
        return fragments, steps.pop()

    def write_state(self, checkpoint: Checkpoint) -> None:
        """Fill this rank's fragments from a checkpoint saved at any world size and stage."""
        for flat in [
            parameter for group in self.optimizer.param_groups for parameter in group["params"]
        ]:
            self._moments(flat, checkpoint.optimizer_step)
        for name, start, views in self._owned():
            for state, view in views.items():
                view.copy_(checkpoint.read(name, state, start, view.numel()))
        if self.deepspeed.zero_optimization():
            self.deepspeed.optimizer.update_lp_params()
