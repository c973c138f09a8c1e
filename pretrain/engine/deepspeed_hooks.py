"""Where this pipeline reaches into a step of DeepSpeed's: its gradient norm, and its update."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Read = Callable[[Tensor | float], Tensor]


def have_norm_read(engine: Any, gradient_clipping: float, read: Read) -> None:
    """Have `read` see each step's gradient norm just before DeepSpeed clips by it.

    `engine` is DeepSpeed's; what `read` returns is the norm that DeepSpeed clips by. The ZeRO
    stages 1 and 2 have one method for it. BF16_Optimizer, which stage 1 gets in bf16, has none: see
    `norm_before_update`.
    """
    zero = engine.optimizer
    if hasattr(zero, "scaled_global_norm"):
        gradient_norm = zero.scaled_global_norm
        zero.scaled_global_norm = lambda: read(gradient_norm())
    elif not engine.zero_optimization():  # DeepSpeed's own clipping forgets the norm
        parameters = list(engine.module.parameters())
        clip = torch.nn.utils.clip_grad_norm_
        engine.clip_fp32_gradients = lambda: read(clip(parameters, gradient_clipping))


def norm_before_update(engine: Any) -> Tensor | float:
    """The gradient norm as BF16_Optimizer leaves it, by the time that it updates."""
    norm: Tensor | float = engine.optimizer._global_grad_norm
    return norm


def have_updates_asked_for(
    optimizer: torch.optim.Optimizer, may_update: Callable[[], bool]
) -> None:
    """Have `optimizer` update only where `may_update` says so.

    A step that is refused goes its way through DeepSpeed, which clears its gradients, but for the
    update itself.
    """
    update = optimizer.step

    def step() -> None:
        if may_update():
            update()

    optimizer.step = step  # type: ignore[method-assign, assignment]
