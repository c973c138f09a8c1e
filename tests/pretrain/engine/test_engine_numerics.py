"""The engine against plain torch: shipped configurations, stages, buckets, ranks, accumulation,
clipping, resumption.

One launch for each number of ranks takes many configurations in turn and holds each against plain
torch in fp32 over the same global batches, step by step: loss, gradient norm, every parameter.
TABLEFREE_NUMERICS=full takes the whole cross product (half an hour) in place of the chosen part.
"""

import copy
import gc
import json
import math
import os
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xxhash
from support.forked_ranks import become_a_rank, fork_server, variables_of
from support.hand_made_runs import manifest_of, rows_of_rank
from support.runs import tiny_recipe_content

from data_prep.shards import Tokens
from pretrain.checkpoint.find import load_for_reading
from pretrain.checkpoint.saving import Savers, save_checkpoint
from pretrain.config.deepspeed import DS_CONFIGS_DIR, load_engine_config, merge_config
from pretrain.config.load import build_recipe
from pretrain.config.recipe import Recipe
from pretrain.data.batches import widened
from pretrain.distributed.world import World, world_from_environment
from pretrain.model.build import build_model
from pretrain.modeling_tablefree import checkpoint_parameters

RANKS = (2, 1, 3)  # what 2 ranks save, 2, 1 and 3 resume
WINDOWS = 18  # a step's: 1, 2 and 3 ranks divide it, with 1 and with 3 micro-batches each
VOCAB_SIZE = 131
RATES = [1e-3, 3e-3, 2e-3, 1e-3]
SAVED_AT = 2
FP32_LIMITS = {"loss": 1e-6, "norm": 1e-6, "masters": 1e-4}
BF16_LIMITS = {"loss": 2**-12, "norm": 2**-8, "masters": 0.25}
# Key biases have no gradient but rounding noise (softmax ignores them), which Adam with a tiny eps
# would blow up.
EPS = 1e-5

# The configurations

Json = dict[str, Any]
PLAIN: Json = {}
BF16: Json = {"bf16": {"enabled": True}}
OFFLOAD: Json = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
# elements; of 62,832 in 29 parameters; the last is DeepSpeed's default
BUCKETS = (100, 1_000, 50_000, 500_000_000)


def stage(number: int, precision: Json = PLAIN, **zero: Any) -> Json:
    """A DeepSpeed JSON."""
    small = {} if "reduce_bucket_size" in zero or number == 0 else {"reduce_bucket_size": 100_000}
    return {"zero_optimization": {"stage": number, **small, **zero}, **precision}


SHIPPED = [load_engine_config(path.stem) for path in sorted(DS_CONFIGS_DIR.glob("*.json"))]
STAGES = [  # those that are not shipped
    stage(0),
    stage(1),
    stage(1, BF16),
    stage(1, **OFFLOAD),
    stage(1, BF16, **OFFLOAD),
    stage(2, **OFFLOAD),
]
CHOSEN = [
    *(
        stage(2, reduce_bucket_size=size, overlap_comm=overlap)
        for size in BUCKETS
        for overlap in (False, True)
    ),
    stage(2, contiguous_gradients=False, reduce_bucket_size=1_000),
    stage(2, contiguous_gradients=False, reduce_bucket_size=1_000, overlap_comm=True),
    stage(2, BF16, contiguous_gradients=False, reduce_bucket_size=1_000, overlap_comm=True),
    stage(2, BF16, reduce_bucket_size=1_000, overlap_comm=True, **OFFLOAD),
    stage(2, BF16, reduce_scatter=False, allgather_bucket_size=1_000),
    stage(2, use_multi_rank_bucket_allreduce=False, reduce_bucket_size=1_000),
    stage(1, reduce_bucket_size=1_000, overlap_comm=True),
    stage(1, contiguous_gradients=False, reduce_bucket_size=1_000),
]
FULL = [
    stage(
        number,
        precision,
        reduce_bucket_size=size,
        overlap_comm=overlap,
        contiguous_gradients=contiguous,
        **offload,
    )
    for number, precision, offload in product((1, 2), (PLAIN, BF16), (PLAIN, OFFLOAD))
    if number == 2 or precision is PLAIN or offload  # stage 1 in bf16 reads none of what follows
    for size, overlap, contiguous in product(BUCKETS, (False, True), (False, True))
]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration of the engine, and what is done with it."""

    engine: Json
    accumulation: int
    clipping: float  # 0.05 bites at every step, 100 at none
    checkpoint: str | None = None
    resumes: bool = False  # from the checkpoint, which is otherwise saved half-way


def cases(ranks: int, home: Path) -> list[Case]:
    """What a launch of so many ranks takes."""
    if os.environ.get("TABLEFREE_NUMERICS") == "full":
        every = product([*SHIPPED, *STAGES, *CHOSEN, *FULL], (1, 3), (0.05, 100.0))
        found = [Case(engine=e, accumulation=a, clipping=c) for e, a, c in every]
    else:
        found = [Case(engine=e, accumulation=3, clipping=0.05) for e in [*STAGES, *CHOSEN]]
        found += [
            Case(engine=e, accumulation=a, clipping=c)
            for e in SHIPPED
            for a, c in ((1, 100.0), (3, 0.05))
        ]
    # 2 ranks save, then resume on new engines
    for resumes in (False, True) if ranks == RANKS[0] else (True,):
        for i, engine in enumerate([*SHIPPED, *STAGES]):
            path = str(home / f"saved-{i}")
            found.append(
                Case(engine=engine, accumulation=1, clipping=0.05, checkpoint=path, resumes=resumes)
            )
    return found


def recipe_of(case: Case, ranks: int) -> Recipe:
    content = tiny_recipe_content(
        model={"vocab_size": VOCAB_SIZE, "seq_len": 8},
        batch={
            "global_batch_tokens": WINDOWS * 8,
            "micro_batch_size": WINDOWS // ranks // case.accumulation,
        },
        optimizer={"gradient_clipping": case.clipping, "eps": EPS, "weight_decay": 0.5},
    )
    return build_recipe(content, "tiny.yaml")


def batch_of(step: int) -> Tokens:
    return np.random.default_rng(step).integers(0, VOCAB_SIZE, (WINDOWS, 9)).astype(np.uint16)


# Plain torch


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one step gave: its loss, its gradient norm, and the masters after it."""

    loss: float
    norm: float
    masters: dict[str, torch.Tensor]


@cache
def plain_torch(clipping: float, dtype: torch.dtype = torch.float32) -> list[Step]:
    """The steps by torch alone, each over its whole batch; fp32 masters of weights in this
    dtype.
    """
    masters = build_model(recipe_of(Case(engine={}, accumulation=1, clipping=clipping), ranks=1))
    weights = copy.deepcopy(masters)
    for weight in weights.parameters():
        weight.data = weight.data.to(dtype)
    pairs = list(zip(masters.parameters(), weights.parameters(), strict=True))
    groups = [
        {"params": [p for p in masters.parameters() if p.ndim == 2], "weight_decay": 0.5},
        {"params": [p for p in masters.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=EPS, foreach=False)
    steps = []
    for step, rate in enumerate(RATES):
        ids = torch.from_numpy(batch_of(step).astype("int64"))
        loss = F.cross_entropy(
            weights(ids[:, :-1]).logits.flatten(0, 1).float(), ids[:, 1:].flatten()
        )
        weights.zero_grad()
        loss.backward()
        for master, weight in pairs:
            assert weight.grad is not None
            master.grad = weight.grad.float()
        norm = torch.nn.utils.clip_grad_norm_(masters.parameters(), clipping)
        assert (norm > clipping) == (clipping < 1)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        with torch.no_grad():
            for master, weight in pairs:
                weight.copy_(master)
        after = {
            name: parameter.detach().clone() for name, parameter in checkpoint_parameters(masters)
        }
        steps.append(Step(loss=loss.item(), norm=norm.item(), masters=after))
    return steps


# The engine, on forked ranks


@dataclass(kw_only=True)
class Found:
    """What a rank found in a case: largest differences to plain torch over the steps, and what
    shows its end.
    """

    loss: float = 0.0  # relative
    norm: float = 0.0  # relative
    # of a fragment, root mean square, as a part of the rates so far: Adam moves by about those
    masters: float = 0.0
    squares: float = 0.0  # sum over this rank's elements at the end
    figures: list[tuple[float, float]]
    weights_are_masters: bool = True
    weights_digest: str = ""
    masters_digest: str = ""
    error: str = ""


def digest(tensors: Iterator[torch.Tensor]) -> str:
    return xxhash.xxh3_128_hexdigest(
        b"".join(tensor.detach().float().numpy().tobytes() for tensor in tensors)
    )


def try_case(case: Case, world: World) -> Found:
    """Train with this configuration beside what plain torch did."""
    from pretrain.engine.engine import Engine

    recipe = recipe_of(case, world.world_size)
    merged = merge_config(recipe, case.engine, world.world_size)
    engine = Engine(build_model(recipe), recipe, merged, world, torch.device("cpu"))
    found, first_step = Found(figures=[]), 0
    if case.resumes:
        engine.write_state(load_for_reading(Path(str(case.checkpoint))))
        first_step = SAVED_AT
    for step, plain in list(enumerate(plain_torch(case.clipping)))[first_step:]:
        rows = rows_of_rank(engine)
        figures = engine.train_step(
            [widened(batch_of(step)[own], pinned=False) for own in rows], RATES[step]
        )
        found.figures.append((figures.loss, figures.gradient_norm))
        found.loss = max(found.loss, abs(figures.loss / plain.loss - 1))
        found.norm = max(found.norm, abs(figures.gradient_norm / plain.norm - 1))
        fragments, taken = engine.read_state()
        assert taken == step + 1
        weights = {
            name: p.detach().flatten()
            for name, p in checkpoint_parameters(engine.deepspeed.module.model)
        }
        found.squares = 0.0
        for fragment in fragments:
            master = fragment.states["master"]
            own = slice(fragment.start, fragment.start + len(master))
            off = (master - plain.masters[fragment.name].flatten()[own]).norm().item()
            found.squares += off**2
            found.masters = max(
                found.masters, off / math.sqrt(len(master)) / sum(RATES[: step + 1])
            )
            weight = weights[fragment.name][own]
            found.weights_are_masters &= torch.equal(master.to(weight.dtype), weight)
        if case.checkpoint and not case.resumes and taken == SAVED_AT:
            shapes = engine.parameter_shapes()
            manifest = manifest_of(SAVED_AT, shapes, optimizer_step=taken)
            save_checkpoint(Path(case.checkpoint), fragments, manifest, Savers(world=world))
    found.weights_digest = digest(iter(weights.values()))
    found.masters_digest = digest(
        fragment.states[key] for fragment in fragments for key in sorted(fragment.states)
    )
    return found


def be_a_rank(tried: list[Case], variables: dict[str, str], result: Path) -> None:
    """Body of a forked rank: every case in turn, output and what was found to files."""
    become_a_rank(variables, result.with_suffix(".log"))
    from pretrain.engine.process_group import start_process_group

    gc.freeze()  # DeepSpeed's optimizer of stage 1 in bf16 collects garbage many times over
    world, found = world_from_environment(), []
    start_process_group(world)
    for case in tried:
        try:
            found.append(try_case(case, world))
        except Exception as error:
            traceback.print_exc()
            found.append(Found(figures=[], error=f"{type(error).__name__}: {error}"))
    result.write_text(json.dumps([asdict(one) for one in found]))
    os._exit(0)  # DeepSpeed's objects take long to tear down


def launch(ranks: int, home: Path) -> list[tuple[Case, list[Found]]]:
    """Every case of so many ranks, with what each rank found."""
    tried = cases(ranks, home)
    results = [home / f"{ranks}-ranks-{rank}.json" for rank in range(ranks)]
    processes = []
    for variables, result in zip(variables_of(ranks), results, strict=True):
        processes.append(fork_server().Process(target=be_a_rank, args=(tried, variables, result)))
        processes[-1].start()
    for process in processes:
        process.join(1_500)
        if process.is_alive():
            process.kill()
    assert all(result.exists() for result in results), "".join(
        p.read_text() for p in home.glob(f"{ranks}-*.log")
    )
    found = [[Found(**one) for one in json.loads(result.read_text())] for result in results]
    return list(zip(tried, map(list, zip(*found, strict=True)), strict=True))


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[tuple[Case, list[Found]]]]:
    home = tmp_path_factory.mktemp("numerics")
    return {ranks: launch(ranks, home) for ranks in RANKS}


# What is asserted


def is_bf16(case: Case) -> bool:
    return "bf16" in case.engine


@cache
def squares_of_bf16(clipping: float) -> float:
    """How far bf16 weights take plain torch from fp32, summed over all elements."""
    exact, rounded = (
        plain_torch(clipping)[-1].masters,
        plain_torch(clipping, torch.bfloat16)[-1].masters,
    )
    return sum(float((exact[name] - rounded[name]).norm()) ** 2 for name in exact)


def wrong(case: Case, found: list[Found]) -> list[str]:
    """What differs from plain torch by more than rounding explains."""
    if any(rank.error for rank in found):
        return [rank.error for rank in found]
    limits = BF16_LIMITS if is_bf16(case) else FP32_LIMITS
    worst = {name: max(getattr(rank, name) for rank in found) for name in limits}
    problems = [
        f"{name} differs by {worst[name]:.1e}"
        for name, limit in limits.items()
        if not worst[name] < limit
    ]
    squares = sum(rank.squares for rank in found)
    if is_bf16(case) and squares > 2**2 * squares_of_bf16(case.clipping):
        problems.append(
            "the masters are more than twice as far away as those of plain torch with bf16 weights"
        )
    if not all(rank.weights_are_masters for rank in found):
        problems.append("the weights are not the masters")
    if len({rank.weights_digest for rank in found}) > 1:
        problems.append("the ranks' weights differ")
    return problems


@pytest.mark.parametrize("ranks", RANKS)
def test_every_configuration_takes_the_steps_of_plain_torch(
    ranks: int, launched: dict[int, list[tuple[Case, list[Found]]]]
) -> None:
    problems = [
        (case, problem) for case, found in launched[ranks] if (problem := wrong(case, found))
    ]
    assert not problems, "\n".join(
        f"{ranks} ranks, {case}: {'; '.join(problem)}" for case, problem in problems
    )


def test_a_run_that_as_many_ranks_resume_is_the_same_run_bit_for_bit(
    launched: dict[int, list[tuple[Case, list[Found]]]],
) -> None:
    through = {
        case.checkpoint: found
        for case, found in launched[RANKS[0]]
        if case.checkpoint and not case.resumes
    }
    resumed = {case.checkpoint: found for case, found in launched[RANKS[0]] if case.resumes}
    assert len(through) == len(resumed) == len([*SHIPPED, *STAGES])
    for checkpoint, ranks in through.items():
        for rank, again in zip(ranks, resumed[checkpoint], strict=True):
            assert again.figures == rank.figures[SAVED_AT:]
            assert (again.masters_digest, again.weights_digest) == (
                rank.masters_digest,
                rank.weights_digest,
            )
