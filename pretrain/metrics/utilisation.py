"""Model-FLOPs utilisation (MFU): the model's FLOPs a second over the devices' bf16 peak.

FLOPs as pretrain/costs/flops.py counts them; the term is PaLM's (Chowdhery et al. 2022, arXiv
2204.02311, appendix B).
"""

import torch

from pretrain.config.recipe import Recipe
from pretrain.costs.devices import find_device
from pretrain.costs.flops import flops_per_token
from pretrain.distributed.world import World


class Utilisation:
    """How much of what the devices of a run could do, training does."""

    def __init__(self, recipe: Recipe, device: torch.device, world: World) -> None:
        self.flops_per_token = flops_per_token(recipe.model)
        self.name = device.type
        memory = None
        if device.type == "cuda":
            self.name = torch.cuda.get_device_name(device)
            memory = torch.cuda.get_device_properties(device).total_memory
        known = find_device(self.name, memory)
        # FLOP/s of all ranks together; None where the device is in no table.
        self.peak_flops = known.peak_flops * world.world_size if known else None

    def mfu(self, tokens_per_s: float) -> float | None:
        """Between 0 and 1; None where the device's peak is not known."""
        if self.peak_flops is None:
            return None
        return tokens_per_s * self.flops_per_token / self.peak_flops

    def __str__(self) -> str:
        cost = f"{self.flops_per_token / 1e9:.3g} GFLOP a token"
        if self.peak_flops is None:
            return f"device {self.name}: {cost}; its peak is not known, so no MFU is shown"
        peak = f"{self.peak_flops / 1e12:,.0f} TFLOP/s"
        return f"device {self.name}: {cost}, peak {peak} over all ranks"
