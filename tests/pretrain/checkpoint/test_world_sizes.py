"""What N ranks saved is loaded by M, saved by them, and loaded by N again: the same state, batches
and losses.

One launch for each number of ranks takes all configurations of the engine in turn, with the
training command's own parts: its checks, its loader, its restore and its save. First every number
of ranks trains from the start and saves half-way; then each loads what another saved, saves it
again before a step is taken, and trains on; at last the first loads both, what came back untouched
and what was trained meanwhile.
"""

import gc
import json
import os
import traceback
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from support.forked_ranks import become_a_rank, fork_server, variables_of
from support.runs import counting_dataset, write_recipe

from pretrain.checkpoint.find import newest_good
from pretrain.checkpoint.reader import Checkpoint
from pretrain.distributed.world import World, world_from_environment
from pretrain.modeling_tablefree import checkpoint_parameters
from pretrain.run.saving import around_saves

pytestmark = pytest.mark.slow

RANKS = (1, 2, 3, 4)
VOCAB_SIZE = 131
WINDOWS = 12  # a step's
MICRO_BATCH = {1: 6, 2: 6, 3: 2, 4: 3}  # by ranks: 2, 1, 2 and 1 micro-batches a step
SAVED_AT, TRAINED_ON_TO, STEPS = 3, 5, 6
STATES = ("master", "exp_avg", "exp_avg_sq")
WEIGHT_DECAY = 0.3

Json = dict[str, Any]
BF16: Json = {"bf16": {"enabled": True}}
OFFLOAD: Json = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
ENGINES: dict[str, Json] = {
    "stage-0": {"zero_optimization": {"stage": 0}},
    "stage-1": {"zero_optimization": {"stage": 1, "reduce_bucket_size": 10_000}},
    "stage-1-bf16": {"zero_optimization": {"stage": 1, "reduce_bucket_size": 10_000}, **BF16},
    "stage-2": {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 10_000, "overlap_comm": True}
    },
    "stage-2-offload": {"zero_optimization": {"stage": 2, "reduce_bucket_size": 10_000, **OFFLOAD}},
    "stage-2-bf16": {"zero_optimization": {"stage": 2, "reduce_bucket_size": 10_000}, **BF16},
    "stage-2-bf16-offload": {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 10_000, **OFFLOAD},
        **BF16,
    },
}
# the other engines take pairs in which each number of ranks saves once and loads once
EVERY_PAIR = "stage-2"
PAIRS = {name: [(1, 3), (3, 2), (2, 4), (4, 1)] for name in ENGINES} | {
    EVERY_PAIR: [*permutations(RANKS, 2)]
}
LOSS_LIMIT, BF16_LOSS_LIMIT = 1e-4, 2e-4  # measured: 1.4e-7 and 2.5e-5

# The ranks


@dataclass(frozen=True, kw_only=True)
class Leg:
    """A run that some ranks go on with, where there is something to go on with, and where they
    save it.
    """

    engine: str
    run_dir: Path
    saves: dict[int, Path]  # by steps of the whole run; the last one ends the leg


@dataclass(kw_only=True)
class Found:
    """What a rank found in a leg."""

    losses: dict[int, float] = field(default_factory=dict)
    # of the samples that this rank took in each step
    numbers: dict[int, list[int]] = field(default_factory=dict)
    # of the group of each parameter of which it has a part
    decays: dict[str, float] = field(default_factory=dict)
    elements: dict[str, int] = field(default_factory=dict)  # in that part
    optimizer_steps: list[int] = field(default_factory=list)  # of each group, as the leg began
    weights_differ: list[str] = field(default_factory=list)  # from the masters loaded
    error: str = ""


class NotingLoader:
    """A run's loader, which notes the samples that are asked for."""

    def __init__(self, loader: Any) -> None:
        self.loader, self.numbers = loader, []

    def samples(self, numbers: Any) -> Any:
        self.numbers += numbers.tolist()
        return self.loader.samples(numbers)


def look_at_groups(engine: Any, found: Found) -> None:
    """Note which parameter groups this rank's parts are in, and how many steps each group has
    taken.
    """
    groups = engine.optimizer.param_groups
    for name, parameter in checkpoint_parameters(engine.deepspeed.module.model):
        if not engine.deepspeed.zero_optimization():
            (group,) = (
                group for group in groups if any(one is parameter for one in group["params"])
            )
            found.decays[name], found.elements[name] = group["weight_decay"], parameter.numel()
        elif (mapping := parameter._hp_mapping) is not None:
            found.decays[name] = groups[mapping.param_group_index]["weight_decay"]
            found.elements[name] = mapping.hp_fragment_address.numel
    found.optimizer_steps = sorted(
        {int(state["step"]) for state in engine.optimizer.state.values()}
    )


def go(leg: Leg, flags: list[str], world: World) -> Found:
    """Load, save, train and save with the parts of the training command."""
    from pretrain.checkpoint.writer import CheckpointWriter
    from pretrain.config.schedule import learning_rate
    from pretrain.data.batches import StepBatches
    from pretrain.engine.engine import Engine
    from pretrain.model.build import build_model
    from pretrain.run.bad_steps import BadSteps
    from pretrain.run.prepare import prepare
    from pretrain.run.saving import save
    from pretrain.run.trainer import restore

    run = prepare([*flags, "--run-dir", str(leg.run_dir)], world)
    noting = NotingLoader(run.loader)
    run = replace(run, loader=noting)  # type: ignore[arg-type]
    engine = Engine(
        build_model(run.recipe), run.recipe, run.engine_config, world, torch.device("cpu")
    )
    bad_steps = BadSteps(leg.run_dir, run.recipe.bad_steps, world)
    found, first_step = Found(), restore(run, engine, bad_steps)
    look_at_groups(engine, found)
    batches = StepBatches(run.loader, run.recipe, world, pinned=False)
    if checkpoint := newest_good(leg.run_dir, world)[0]:
        for name, weight in checkpoint_parameters(engine.deepspeed.module.model):
            if not torch.equal(weight, checkpoint.parameter(name).to(weight.dtype)):
                found.weights_differ.append(name)
    for step in range(first_step, max(leg.saves) + 1):
        if step in leg.saves:
            with CheckpointWriter(
                leg.saves[step], run.recipe.checkpoints, world, around_saves(leg.saves[step])
            ) as writer:
                save(run, engine, bad_steps, writer, step)
        if step < max(leg.saves):
            noting.numbers = []
            rate = learning_rate(
                step, STEPS, run.recipe.optimizer.peak_learning_rate, run.recipe.schedule
            )
            found.losses[step] = engine.train_step(batches.of_step(step), rate).loss
            found.numbers[step] = noting.numbers
    return found


def be_a_rank(
    legs: list[Leg], recipe: Path, data: Path, variables: dict[str, str], result: Path
) -> None:
    """Body of a forked rank: every leg in turn, output and what was found to files."""
    become_a_rank(variables, result.with_suffix(".log"))
    from pretrain.engine.process_group import start_process_group

    gc.freeze()  # DeepSpeed's optimizer of stage 1 in bf16 collects garbage many times over
    world, found = world_from_environment(), []
    start_process_group(world)
    flags = [
        "--recipe",
        str(recipe),
        "--data-dir",
        str(data),
        f"--batch.micro_batch_size={MICRO_BATCH[world.world_size]}",
    ]
    for leg in legs:
        try:
            found.append(
                go(
                    leg,
                    [*flags, "--deepspeed-config", str(recipe.with_name(f"{leg.engine}.json"))],
                    world,
                )
            )
        except Exception as error:
            traceback.print_exc()
            found.append(Found(error=f"{type(error).__name__}: {error}"))
    result.write_text(json.dumps([asdict(one) for one in found]))
    os._exit(0)  # DeepSpeed's objects take long to tear down


def from_json(content: Json) -> Found:
    """What a rank wrote; the keys of JSON are strings."""
    by_step = {
        key: {int(step): value for step, value in content[key].items()}
        for key in ("losses", "numbers")
    }
    return Found(**{**content, **by_step})


def launch(ranks: int, legs: list[Leg], recipe: Path, data: Path, home: Path) -> list[list[Found]]:
    """Every leg on so many ranks: what each rank found in it."""
    results = [home / f"{ranks}-ranks-{rank}.json" for rank in range(ranks)]
    for result in results:
        result.unlink(missing_ok=True)
    processes = []
    for variables, result in zip(variables_of(ranks), results, strict=True):
        processes.append(
            fork_server().Process(target=be_a_rank, args=(legs, recipe, data, variables, result))
        )
        processes[-1].start()
    for process in processes:
        process.join(300)
        if process.is_alive():
            process.kill()
    assert all(result.exists() for result in results), "".join(
        p.read_text() for p in home.glob(f"{ranks}-*.log")
    )
    found = [[from_json(one) for one in json.loads(result.read_text())] for result in results]
    return list(map(list, zip(*found, strict=True)))


# The legs


@dataclass(frozen=True, kw_only=True)
class Launched:
    """All that was saved, below one directory, and what the ranks found in every leg, by where
    it saved first.
    """

    home: Path
    found: dict[Path, list[Found]]

    def place(self, engine: str, *way: Any) -> Path:
        """The directory of a state by the numbers of ranks that it went through."""
        return self.home / engine / "-".join(map(str, way))

    def saved(self, step: int, engine: str, *way: Any) -> Checkpoint:
        """A checkpoint by the numbers of ranks that it went through."""
        checkpoint, said = newest_good(self.place(engine, *way))
        assert (checkpoint is not None and checkpoint.step, said) == (step, [])
        assert checkpoint is not None
        return checkpoint

    def ranks(self, engine: str, *way: Any) -> list[Found]:
        """What the ranks of a leg found."""
        return self.found[self.place(engine, *way)]


def legs_of(launched: Launched, turn: int) -> Iterable[tuple[int, Leg]]:
    """How many ranks take which legs in the first, second and third turn."""
    for name in ENGINES:

        def leg(source: list[Any], saves: dict[int, list[Any]], name: str = name) -> Leg:
            places = {step: launched.place(name, *way) for step, way in saves.items()}
            return Leg(engine=name, run_dir=launched.place(name, *source), saves=places)

        for n in RANKS if turn == 0 else ():
            yield n, leg([n, "new"], {SAVED_AT: [n], STEPS: [n, "end"]})
        for n, m in PAIRS[name] if turn == 1 else ():
            yield m, leg([n], {SAVED_AT: [n, m], TRAINED_ON_TO: [n, m, "trained"]})
        for n, m in PAIRS[name] if turn == 2 else ():
            yield n, leg([n, m], {SAVED_AT: [n, m, n], STEPS: [n, m, n, "end"]})
            yield n, leg([n, m, "trained"], {STEPS: [n, m, "trained", n]})


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    home = tmp_path_factory.mktemp("world-sizes")
    data = counting_dataset(home / "dataset", VOCAB_SIZE)
    recipe = write_recipe(
        home / "recipe.yaml",
        model={"vocab_size": VOCAB_SIZE, "seq_len": 8},
        batch={"global_batch_tokens": WINDOWS * 8},
        optimizer={"peak_learning_rate": 0.01, "weight_decay": WEIGHT_DECAY},
        train_tokens=STEPS * WINDOWS * 8,
    )
    for name, content in ENGINES.items():
        (home / f"{name}.json").write_text(json.dumps(content))
    launched = Launched(home=home / "saved", found={})
    for turn in range(3):
        for ranks in RANKS:
            legs = [leg for taken_by, leg in legs_of(launched, turn) if taken_by == ranks]
            for leg, found in zip(legs, launch(ranks, legs, recipe, data, home), strict=True):
                launched.found[leg.saves[min(leg.saves)]] = found
    return launched


# What is asserted

each_engine = pytest.mark.parametrize("engine", ENGINES)


def test_every_leg_was_gone(launched: Launched) -> None:
    errors = {
        place: [rank.error for rank in found if rank.error]
        for place, found in launched.found.items()
    }
    assert not {str(place): error for place, error in errors.items() if error}
    assert len(launched.found) == 4 * len(ENGINES) + 3 * (4 * (len(ENGINES) - 1) + 12)


def assert_equal_states(one: Checkpoint, other: Checkpoint) -> None:
    """Every element of every state of every parameter, and what is said of them."""
    assert one.shapes == other.shapes
    for name in one.shapes:
        for state in STATES:
            left, right = one.parameter(name, state), other.parameter(name, state)
            assert left.dtype == right.dtype == torch.float32
            assert torch.equal(left.view(torch.int32), right.view(torch.int32)), (
                f"{other.path}: {name}/{state}"
            )
            assert left.any(), f"{one.path}: {name}/{state} is all zeros"
    for key in (
        "step",
        "optimizer_step",
        "seed",
        "fingerprint",
        "data",
        "skips",
        "parameters",
        "model_config",
    ):
        assert getattr(one.manifest, key) == getattr(other.manifest, key), key


@each_engine
def test_what_other_ranks_loaded_and_saved_again_is_equal_element_by_element(
    launched: Launched, engine: str
) -> None:
    for n, m in PAIRS[engine]:
        first = launched.saved(SAVED_AT, engine, n)
        assert first.manifest.optimizer_step == SAVED_AT
        for way in ([n, m], [n, m, n]):
            again = launched.saved(SAVED_AT, engine, *way)
            assert len(again.manifest.files) == way[-1]
            assert_equal_states(first, again)
        back = launched.saved(SAVED_AT, engine, n, m, n)
        assert [file.xxh3_128 for file in back.manifest.files] == [
            file.xxh3_128 for file in first.manifest.files
        ]


@each_engine
def test_each_element_is_in_one_file_alone(launched: Launched, engine: str) -> None:
    for way in [*((n,) for n in RANKS), *PAIRS[engine]]:
        checkpoint = launched.saved(SAVED_AT, engine, *way)
        for name, shape in checkpoint.shapes.items():
            parts = sorted(
                file.fragments[name] for file in checkpoint.manifest.files if name in file.fragments
            )
            ends = [0, *(start + count for start, count in parts)]
            assert [start for start, _ in parts] == ends[:-1], (checkpoint.path, name)
            assert ends[-1] == torch.Size(shape).numel()


@each_engine
def test_the_step_count_and_both_parameter_groups_survive(launched: Launched, engine: str) -> None:
    shapes = launched.saved(SAVED_AT, engine, 1).shapes
    expected = {name: WEIGHT_DECAY if len(shape) == 2 else 0.0 for name, shape in shapes.items()}
    assert {*expected.values()} == {WEIGHT_DECAY, 0.0}
    for n, m in PAIRS[engine]:
        for way, first_step in (
            ((n, m), SAVED_AT),
            ((n, m, n), SAVED_AT),
            ((n, m, "trained", n), TRAINED_ON_TO),
        ):
            ranks = launched.ranks(engine, *way)
            elements = dict.fromkeys(shapes, 0)
            for rank in ranks:
                assert rank.optimizer_steps == [first_step]
                assert rank.weights_differ == []
                assert rank.decays.items() <= expected.items()
                for name, count in rank.elements.items():
                    elements[name] += count
            copies = len(ranks) if engine == "stage-0" else 1
            assert elements == {
                name: copies * torch.Size(shape).numel() for name, shape in shapes.items()
            }
        end = launched.saved(STEPS, engine, n, m, "trained", n)
        assert (end.step, end.manifest.optimizer_step) == (STEPS, STEPS)


@each_engine
def test_every_step_takes_the_same_samples(launched: Launched, engine: str) -> None:
    ways = [(n,) for n in RANKS]
    ways += [way for n, m in PAIRS[engine] for way in ((n, m), (n, m, n), (n, m, "trained", n))]
    trained = set()
    for way in ways:
        ranks = launched.ranks(engine, *way)
        for step in ranks[0].losses:
            taken = sorted(number for rank in ranks for number in rank.numbers[step])
            assert taken == list(range(step * WINDOWS, (step + 1) * WINDOWS)), (way, step)
            assert {len(rank.numbers[step]) for rank in ranks} == {WINDOWS // len(ranks)}
            trained.add((len(way), step))
    through = {(1, step) for step in range(STEPS)}
    assert trained == through | {(2, 3), (2, 4), (3, 3), (3, 4), (3, 5), (4, 5)}


@each_engine
def test_losses_are_those_of_the_run_that_stayed_on_its_ranks(
    launched: Launched, engine: str
) -> None:
    limit = BF16_LOSS_LIMIT if "bf16" in engine else LOSS_LIMIT
    for n, m in PAIRS[engine]:
        through = launched.ranks(engine, n)[0].losses
        moved = {
            **launched.ranks(engine, n, m)[0].losses,
            **launched.ranks(engine, n, m, "trained", n)[0].losses,
        }
        assert sorted(moved) == [3, 4, 5]
        assert moved == pytest.approx({step: through[step] for step in moved}, rel=limit), (n, m)
    assert through[5] < through[0]


@each_engine
def test_a_state_that_other_ranks_only_saved_again_goes_on_bit_for_bit(
    launched: Launched, engine: str
) -> None:
    for n, m in PAIRS[engine]:
        through, back = (
            launched.ranks(engine, n)[0].losses,
            launched.ranks(engine, n, m, n)[0].losses,
        )
        assert back == {step: through[step] for step in range(SAVED_AT, STEPS)}
        assert_equal_states(
            launched.saved(STEPS, engine, n, "end"), launched.saved(STEPS, engine, n, m, n, "end")
        )
