"""Model-FLOPs utilisation (MFU): the model's FLOPs a second over the devices' bf16 peak.

FLOPs as pretrain/costs/flops.py counts them; the term is PaLM's (Chowdhery et al. 2022, arXiv
2204.02311, appendix B). Of CPUs, and of devices in no table, no peak is known: there the model's
FLOPs a second are held against those of a matrix product, measured on all ranks at once when a
start begins.
"""

import time

import torch

from pretrain.config.recipe import Recipe
from pretrain.costs.devices import find_device
from pretrain.costs.flops import flops_per_token
from pretrain.distributed.agree import barrier, gather
from pretrain.distributed.world import World

# Rows and columns of the matrices: large enough that a product is bound by arithmetic; on a CPU so
# small that, where others use it too, one of many products is not interrupted: there, on two
# threads, those of 1024 reached 67 and 81 GFLOP/s in two rounds, where one of 512 reached 186.
# Where nobody else is at work, both are as fast.
MATMUL_SIZE = {"cpu": 512, "cuda": 8192}
# How long it is measured: of products of 2 to 5 ms on two cores, the best of a hundred or so. In
# parts with a pause between, in which a burst of others' work may pass.
ROUNDS = 4
ROUND_S = 0.08
PAUSE_S = 0.02


class Utilisation:
    """How much of what the devices of a run could do, training does.

    All ranks make one, and call it alike: where the peak is not known, they measure together.
    """

    def __init__(
        self, recipe: Recipe, device: torch.device, dtype: torch.dtype, world: World
    ) -> None:
        self.flops_per_token = flops_per_token(recipe.model)
        self.name = device.type
        self.dtype = dtype
        memory = None
        if device.type == "cuda":
            self.name = torch.cuda.get_device_name(device)
            memory = torch.cuda.get_device_properties(device).total_memory
        known = find_device(self.name, memory)
        # FLOP/s of all ranks together; None where the device is in no table.
        self.peak_flops = known.peak_flops * world.world_size if known else None
        # The same, of a matrix product; None where the peak is known.
        self.matmul_flops = None if known else measured_flops(device, dtype)

    def mfu(self, tokens_per_s: float) -> float | None:
        """Between 0 and 1; None where the device's peak is not known."""
        if self.peak_flops is None:
            return None
        return tokens_per_s * self.flops_per_token / self.peak_flops

    def mfu_of_matmul(self, tokens_per_s: float) -> float | None:
        """Against the measured matrix product; None where the device's peak is known."""
        if self.matmul_flops is None:
            return None
        return tokens_per_s * self.flops_per_token / self.matmul_flops

    def __str__(self) -> str:
        cost = f"{self.flops_per_token / 1e9:.3g} GFLOP a token"
        if self.peak_flops is not None:
            peak = f"{self.peak_flops / 1e12:,.0f} TFLOP/s"
            return f"device {self.name}: {cost}, peak {peak} over all ranks"
        reached = f"{(self.matmul_flops or 0) / 1e12:.3g} TFLOP/s"
        kind = str(self.dtype).removeprefix("torch.")
        return (
            f"device {self.name}: {cost}; MFU* is against a measured {kind} matrix product, "
            f"{reached} over all ranks"
        )


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product, over all ranks, which multiply at the same time."""
    barrier()
    of_ranks: list[float] = gather(flops_of_matmul(device, dtype))
    return sum(of_ranks)


def flops_of_matmul(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest product after a first one, which sets the library up."""
    size = MATMUL_SIZE.get(device.type, MATMUL_SIZE["cpu"])
    # Ones: random numbers would be drawn from the generator that training draws from.
    factor = torch.ones(size, size, device=device, dtype=dtype)
    product = torch.empty_like(factor)
    best_s = float("inf")

    def multiply() -> float:
        started = time.perf_counter()
        torch.mm(factor, factor, out=product)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    with torch.no_grad():
        multiply()
        for _ in range(ROUNDS):
            best_s = min(best_s, multiply())
            deadline = time.perf_counter() + ROUND_S
            while time.perf_counter() < deadline:
                best_s = min(best_s, multiply())
            time.sleep(PAUSE_S)
    return 2.0 * size**3 / best_s
