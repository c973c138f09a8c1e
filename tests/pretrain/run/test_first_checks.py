"""What is refused before torch is imported, the engine of a run that goes on, and what the
launch script starts.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.forked_ranks import run_ranks, train_on
from support.runs import REPOSITORY, counting_dataset, environment, write_recipe

from data_prep.errors import UserError
from data_prep.shards import ShardReader
from launch import hosts
from launch.hosts import HERE
from launch.supervise import Supervisor, parse
from pretrain.config.changes import ENGINE_MAY_CHANGE_ON_RESUME, refuse_changes
from pretrain.config.deepspeed import MONITORS
from pretrain.config.load import load_recipe
from pretrain.plan import plan
from pretrain.run.first_checks import (
    check_arguments,
    describe_default_start,
    engine_flags_by_default,
    ranks_by_default,
)

# Runs the training command's module as a program, once for each list of arguments: what it said,
# how it ended, and whether torch was imported meanwhile.
RUN_EACH = """
import contextlib, io, json, runpy, sys
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["pretrain.train", *arguments]
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            runpy.run_module("pretrain.train", run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as ended:
            code = ended.code
    print(json.dumps([code, said.getvalue(), "torch" in sys.modules]))
"""
TOO_LARGE = "--batch.global_batch_tokens=3200000"


def asked(recipe: Path | str, data: Path, run_dir: Path, *more: str) -> list[str]:
    return ["--recipe", str(recipe), "--data-dir", str(data), "--run-dir", str(run_dir), *more]


def engine_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "deepspeed.json").read_text())


def test_what_arithmetic_refuses_is_refused_before_torch_is_imported(
    tiny_data: Path, tmp_path: Path
) -> None:
    recipe, run_dir = write_recipe(tmp_path / "r.yaml"), tmp_path / "run"
    (tmp_path / "bad.json").write_text('{"zero_optimization": {"stage": 3}}')
    cut = counting_dataset(tmp_path / "cut")
    lost = ShardReader(cut).manifest.shards_of("train")[0].path
    (cut / lost).unlink()
    members = {
        "no such file; did you mean": asked(tmp_path / "s.yaml", tiny_data, run_dir),
        "unknown key model.depth; did you mean model.num_layers?": [
            *asked(recipe, tiny_data, run_dir),
            "--model.depth=9",
        ],
        "num_heads 5 is 9.6": [*asked(recipe, tiny_data, run_dir), "--model.num_heads=5"],
        "does not divide model.d_model": [
            *asked(recipe, tiny_data, run_dir),
            "--model.code_bits=11",
        ],
        "steps of warm-up are longer": [
            *asked(recipe, tiny_data, run_dir),
            "--schedule.warmup_steps=21",
        ],
        "does not divide over 1 ranks": [
            *asked(recipe, tiny_data, run_dir),
            "--batch.micro_batch_size=4",
        ],
        "required: --data-dir, --run-dir": asked(recipe, tiny_data, run_dir)[:2],
        "none: no such directory": asked(recipe, tmp_path / "none", run_dir),
        "fewer than one batch": [
            *asked(recipe, tiny_data, run_dir),
            TOO_LARGE,
            "--train_tokens=1e9",
        ],
        "its tokenizer has 512 ids": [*asked(recipe, tiny_data, run_dir), "--model.vocab_size=511"],
        "stage is 3, expected 0, 1 or 2": [
            *asked(recipe, tiny_data, run_dir),
            f"--deepspeed-config={tmp_path / 'bad.json'}",
        ],
        lost: asked(recipe, cut, run_dir),
        "--stop-at-step": [*asked(recipe, tiny_data, run_dir), "--stop-at-step=0"],
    }
    command = [sys.executable, "-c", RUN_EACH, json.dumps(list(members.values()))]
    result = subprocess.run(
        command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    ends = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(ends) == len(members)
    for says, (code, said, has_torch) in zip(members, ends, strict=True):
        assert (code, has_torch) == (2, False), said
        assert says in said
        assert said.startswith("error: ")
        assert len(said.splitlines()) == 1
    assert not run_dir.exists()


def test_of_several_ranks_on_one_machine_each_knows_and_on_several_machines_they_meet_first(
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from pretrain.run.first_checks import refuse_early

    arguments = asked(
        write_recipe(tmp_path / "r.yaml"), tiny_data, tmp_path / "run", "--batch.micro_batch_size=2"
    )
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(SystemExit) as ended:
        refuse_early(arguments)
    assert ended.value.code == 2
    assert (
        "a step of 6 windows does not divide over 4 ranks x micro-batch 2" in capfd.readouterr().err
    )
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    refuse_early(arguments)
    assert capfd.readouterr().err == ""


# launch/pretrain.sh


def job(*arguments: str) -> Supervisor:
    return Supervisor(parse(list(arguments)))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--model.depth=9"], "unknown key model.depth; did you mean model.num_layers?"),
        (["--ranks=4"], "a step of 6 windows does not divide over 4 ranks"),
        (["--batch.micro_batch_size=4"], "a step of 6 windows does not divide over 1 ranks"),
        (["--deepspeed-config=zero3"], "engine zero3: no such file"),
        (["--data-dir=none"], "none: "),
        (["--stop-at-step=none"], "argument --stop-at-step"),
    ],
)
def test_the_launch_script_refuses_before_it_starts_anything(
    more: list[str], says: str, tiny_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml")
    with pytest.raises(UserError) as refused:
        job(*asked(recipe, tiny_data, tmp_path / "run"), *more).run()
    assert says in str(refused.value)
    assert "+ deepspeed" not in capfd.readouterr().out


def test_gpus_that_do_not_divide_a_step_are_refused_before_they_are_started(
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(hosts, "COUNT_GPUS", ("echo", "4"))
    with pytest.raises(UserError, match="a step of 6 windows does not divide over 4 ranks"):
        job(*asked(write_recipe(tmp_path / "r.yaml"), tiny_data, tmp_path / "run")).run()
    assert "+ deepspeed" not in capfd.readouterr().out


def test_without_a_gpu_the_script_takes_as_many_ranks_as_divide_a_step(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "COUNT_GPUS", ("echo", "0"))
    for windows, ranks in ((6, 2), (3, 1), (1, 1)):
        recipe = write_recipe(tmp_path / "r.yaml", batch={"global_batch_tokens": windows * 32})
        started = job(*asked(recipe, tiny_data, tmp_path / "run"))
        assert started.find_gpus()[0] == {HERE: ranks}
        assert ranks_by_default(load_recipe(str(recipe)), gpus=0) == ranks
        assert ranks_by_default(load_recipe(str(recipe)), gpus=8) == 8


def test_a_data_set_on_the_disks_of_hosts_alone_is_not_looked_for_here(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("node1 slots=4\n")
    recipe = write_recipe(tmp_path / "r.yaml")
    arguments = [
        *asked(recipe, tmp_path / "none", tmp_path / "run"),
        "--hostfile",
        str(tmp_path / "hosts"),
    ]
    started = job(*arguments)
    started.check(started.job.trainer_flags, 3)
    with pytest.raises(UserError, match="does not divide over 4 ranks"):
        started.check(started.job.trainer_flags, 4)


def test_a_dry_run_says_what_the_script_would_start_and_what_it_would_refuse(
    tiny_data: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", engine="zero2_bf16")
    arguments = asked(recipe, tiny_data, tmp_path / "run", "--dry-run")
    fp32 = "--deepspeed-config zero2_fp32"
    assert describe_default_start(arguments, 0, 1e12) == (
        f"launch/pretrain.sh would start 2 ranks here {fp32}: 3 micro-batches each"
    )
    assert (
        describe_default_start(arguments, 3, 1e12)
        == "launch/pretrain.sh would start 3 ranks here: 2 micro-batches each"
    )
    refused = describe_default_start(arguments, 4, 1e12)
    assert refused.startswith(
        "warning: launch/pretrain.sh would start 4 ranks here, and that is refused: a step of 6"
    )
    assert "needs" in describe_default_start(arguments, 0, 1e6)
    program = "import sys; from pretrain.train import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, *arguments]
    result = subprocess.run(
        command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "steps of 192 tokens: 1 rank x 6 micro-batches" in result.stdout
    assert (
        f"launch/pretrain.sh would start 2 ranks here {fp32}: 3 micro-batches each" in result.stdout
    )


# The engine of a run that goes on


def test_a_run_goes_on_with_the_engine_it_began_with_if_nobody_names_one(
    tiny_data: Path, tmp_path: Path
) -> None:
    recipe, run_dir = write_recipe(tmp_path / "r.yaml", engine="zero2_bf16"), tmp_path / "run"
    # as the script does on a CPU
    begun = engine_flags_by_default(asked(recipe, tiny_data, run_dir), gpus=0)
    assert begun == ["--deepspeed-config", "zero2_fp32"]
    train_on(1, recipe, tiny_data, run_dir, "--stop-at-step=5", *begun)
    assert engine_flags_by_default(asked(recipe, tiny_data, run_dir), gpus=0) == []
    said = train_on(1, recipe, tiny_data, run_dir, "--stop-at-step=10")
    assert (
        f"{run_dir}: the run began with --deepspeed-config zero2_fp32, not the recipe's "
        "zero2_bf16: it goes on so" in said
    )
    assert "bf16" not in engine_of(run_dir)

    for explicit in ("--deepspeed-config=zero2_bf16", "--engine=zero2_bf16"):
        refused = run_ranks(1, recipe, tiny_data, run_dir, explicit)
        assert refused.exit_codes == [2]
        assert "(chosen with --deepspeed-config): this run was started with " in refused.output
    other = write_recipe(tmp_path / "other.yaml", engine="zero2_bf16_offload")  # the recipe changed
    assert check_arguments(asked(other, tiny_data, run_dir), 1).engine_note == ""


def test_a_run_begun_with_the_recipe_s_engine_goes_on_with_it_on_a_cpu_too(
    tiny_data: Path, tmp_path: Path
) -> None:
    recipe, run_dir = write_recipe(tmp_path / "r.yaml", engine="zero2_bf16"), tmp_path / "run"
    train_on(1, recipe, tiny_data, run_dir, "--stop-at-step=5")
    arguments = asked(recipe, tiny_data, run_dir)
    assert engine_flags_by_default(arguments, gpus=0) == []
    now = check_arguments(arguments, 1)
    assert (now.engine_note, now.engine_config) == ("", engine_of(run_dir))


def test_an_engine_of_one_s_own_is_kept_and_its_flag_is_named_when_it_is_left_out(
    tiny_data: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own.json"
    own.write_text('{"zero_optimization": {"stage": 1, "reduce_bucket_size": 1000}}')
    recipe, run_dir = write_recipe(tmp_path / "r.yaml", engine=str(own)), tmp_path / "run"
    arguments = asked(recipe, tiny_data, run_dir)
    assert engine_flags_by_default(arguments, gpus=0) == []  # it is in fp32 already
    train_on(1, recipe, tiny_data, run_dir, "--stop-at-step=5")
    assert (
        check_arguments(arguments, 1).engine_config["zero_optimization"]["reduce_bucket_size"]
        == 1000
    )

    in_bf16 = write_recipe(tmp_path / "bf16.yaml", engine="zero2_bf16")
    train_on(
        1, in_bf16, tiny_data, tmp_path / "run-2", "--stop-at-step=5", f"--deepspeed-config={own}"
    )
    refused = run_ranks(1, in_bf16, tiny_data, tmp_path / "run-2")
    assert refused.exit_codes == [2]
    assert (
        "(chosen with --deepspeed-config): this run was started with zero_optimization.stage=1"
        in refused.output
    )


@pytest.mark.parametrize("damage", ["", "[", "[1]", "{}"])
def test_a_damaged_record_of_the_engine_is_passed_over(
    damage: str, tiny_data: Path, tmp_path: Path
) -> None:
    recipe, run_dir = write_recipe(tmp_path / "r.yaml"), tmp_path / "run"
    (run_dir / "checkpoints" / "step-00000005").mkdir(parents=True)
    (run_dir / "checkpoints" / "step-00000005" / "rank-00000-of-00001.safetensors").touch()
    for name in ("recipe.yaml", "deepspeed.json"):
        (run_dir / name).write_text(damage)
    assert check_arguments(asked(recipe, tiny_data, run_dir), 1).engine_note == ""


# model.vocab_size: auto


def test_auto_is_the_data_set_s_vocabulary_from_the_first_step_to_the_end(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run_dir = (
        write_recipe(tmp_path / "r.yaml", model={"vocab_size": "auto"}),
        tmp_path / "run",
    )
    train_on(1, recipe, tiny_data, run_dir, "--stop-at-step=5")
    assert yaml.safe_load((run_dir / "recipe.yaml").read_text())["model"]["vocab_size"] == 512
    train_on(1, recipe, tiny_data, run_dir)
    same = write_recipe(tmp_path / "number.yaml", model={"vocab_size": 512})
    train_on(1, same, tiny_data, tmp_path / "other")
    kept = [
        "recipe.yaml",
        "deepspeed.json",
        "checkpoints/step-00000020/rank-00000-of-00001.safetensors",
    ]
    for name in kept:
        assert (run_dir / name).read_bytes() == (tmp_path / "other" / name).read_bytes()

    with pytest.raises(
        UserError, match=r"r\.yaml: model\.vocab_size is auto, .* give --data-dir, or a number as"
    ):
        plan(["--recipe", str(recipe), "--device", "h200"])
    plan(["--recipe", str(recipe), "--device", "h200", "--data-dir", str(tiny_data)])
    assert "trained" in capsys.readouterr().out


def test_the_small_recipe_takes_any_vocabulary(tiny_data: Path) -> None:
    assert load_recipe("small", data_dir=tiny_data).model.vocab_size == 512
    for vocab_size in (256, 8192, 50_257, 65_536):
        recipe = load_recipe("small", [f"--model.vocab_size={vocab_size}"])
        assert recipe.model.vocab_size == vocab_size
        assert ranks_by_default(recipe, gpus=0) == 2


@pytest.mark.parametrize("monitor", MONITORS)
def test_a_monitor_of_deepspeed_s_is_refused_in_a_new_run_with_what_draws_instead(
    monitor: str, tiny_data: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml")
    engine = tmp_path / "engine.json"
    content = {"zero_optimization": {"stage": 2}, monitor: {"enabled": True}}
    engine.write_text(json.dumps(content))
    flags = ["--deepspeed-config", str(engine)]
    says = rf"engine {engine}: {monitor}: DeepSpeed's monitors get no loss here.*\(log\.sinks\)"
    with pytest.raises(UserError, match=says):
        check_arguments(asked(recipe, tiny_data, tmp_path / "run", *flags), 1)
    with pytest.raises(UserError, match=says):
        plan(["--recipe", str(recipe), "--data-dir", str(tiny_data), "--device=H100", *flags])
    assert not (tmp_path / "run").exists()

    engine.write_text(json.dumps(content | {monitor: {"enabled": False}}))
    assert not check_arguments(asked(recipe, tiny_data, tmp_path / "run", *flags), 1).engine_note


def test_a_run_that_has_saved_goes_on_with_a_monitor_and_is_warned_or_without_it(
    tiny_data: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml")
    engine = tmp_path / "engine.json"
    plain = {"zero_optimization": {"stage": 2}}
    engine.write_text(json.dumps(plain))
    flags = ["--deepspeed-config", str(engine)]
    run_dir = tmp_path / "run"
    train_on(1, recipe, tiny_data, run_dir, *flags, "--stop-at-step=1")

    monitor = {"csv_monitor": {"enabled": True, "output_path": str(tmp_path / "drawn")}}
    engine.write_text(json.dumps(plain | monitor))
    output = train_on(1, recipe, tiny_data, run_dir, *flags, "--stop-at-step=2")
    assert output.count(f"warning: engine {engine}: csv_monitor: DeepSpeed's monitors") == 1

    began_with = engine_of(run_dir) | monitor
    engine.write_text(json.dumps(plain))
    now = check_arguments(asked(recipe, tiny_data, run_dir, *flags), 1)
    assert now.engine_note == ""
    refuse_changes(began_with, now.engine_config, ENGINE_MAY_CHANGE_ON_RESUME, "")
