"""DeepSpeed as this pipeline loads it: the only module that imports it."""

import contextlib
import importlib
import os
from typing import Any

import pydantic
import torch
from torch import nn

from data_prep.errors import UserError, first_problem

if not torch.accelerator.is_available():
    # Said, not guessed: DeepSpeed warns when it has to guess.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import compiler

__all__ = ["deepspeed", "get_accelerator", "import_muon_uncompiled", "initialise"]


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


def initialise(module: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    """DeepSpeed's engine around a module. Raises UserError for a configuration that it refuses."""
    try:
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=config, dist_init_required=False
        )
    except pydantic.ValidationError as error:
        raise UserError(f"the DeepSpeed configuration: {first_problem(error, str)}") from None
    except (AssertionError, ImportError, NotImplementedError, ValueError) as error:
        raise UserError(f"the DeepSpeed configuration: {error}") from error
    return engine
