"""torch.compile of the blocks as training runs them (recipe key `compile`).

All blocks share one graph, or two where only some of them recompute. Checkpointing lies inside the
compiled region, so that the compiler sees which results are kept. Without gradients (validation,
generation) the blocks run as they are: other batch shapes there cannot cause a recompilation.
"""

import functools
import importlib.util
import logging
import os
import shlex
import shutil

import torch
from torch._dynamo.utils import counters

from data_prep.errors import UserError
from pretrain.modeling_tablefree import TableFreeForCausalLM, run_block


def apply_compile(model: TableFreeForCausalLM) -> None:
    """Compile the blocks, for training; comes after `apply_activation_checkpointing`.

    No parameter's name changes.
    """
    # They say at every start that a checkpointed region should have no in-place operators; a block
    # has none.
    for module in ("_dynamo.variables.higher_order_ops", "_higher_order_ops.wrap"):
        logger = logging.getLogger(f"torch.{module}")
        logger.setLevel(logging.ERROR)
    compile_whole = functools.partial(torch.compile, dynamic=False, fullgraph=True)
    compiled = functools.cache(compile_whole)  # blocks that run alike share a graph
    decoder = model.model
    for index in range(len(decoder.layers)):
        runner = decoder.block_runners.get(index, run_block)
        decoder.block_runners[index] = compiled(runner)
    decoder.compiled_blocks = True


def compiled_graphs() -> int:
    """Graphs that this process has compiled so far.

    One more after the first step is a recompilation.
    """
    return counters["stats"]["unique_graphs"]


def check_compiler(device_type: str) -> None:
    """Raise UserError unless torch.compile finds its compilers here.

    They are C++ for a CPU, Triton and C for a GPU.
    """
    if device_type == "cpu":
        commands = [os.environ.get("CXX", "g++")]
    else:
        commands = [os.environ.get("CC", "gcc"), "clang"]
    # A command may have arguments, such as `ccache g++`.
    programs = [shlex.split(command)[0] for command in commands]
    missing = ""
    if not any(shutil.which(program) for program in programs):
        missing = f"a compiler ({' or '.join(commands)})"
    if device_type != "cpu" and importlib.util.find_spec("triton") is None:
        missing = "Triton (the package triton)"
    if missing:
        raise UserError(
            f"compile: torch.compile needs {missing}, which is not here; install it, or set "
            "--compile=false"
        )
