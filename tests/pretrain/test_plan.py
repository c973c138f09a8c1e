"""The plan's arithmetic against torch's own shapes, its answers to bad input, and what it says
beside what happens.
"""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import REPOSITORY, counting_dataset, overrides_of

from data_prep.errors import UserError
from pretrain.config.deepspeed import load_engine_config, merge_config
from pretrain.config.load import RECIPES_DIR, load_recipe
from pretrain.config.recipe import Recipe
from pretrain.costs.budgets import chunk_tokens
from pretrain.costs.devices import DEVICES, LINKS
from pretrain.costs.fit import check_it_fits, largest_micro_batch, with_micro_batch
from pretrain.costs.memory import (
    MODES,
    activation_bytes,
    loss_head_bytes,
    needed_bytes,
    phase_bytes,
    sizes_of,
    whole_parameters,
)
from pretrain.costs.step_time import Costs, Spread, parse_interconnect, scale_to, step_seconds
from pretrain.engine.calibrate import calibrate
from pretrain.plan import plan

PAPER = load_recipe("paper_binary_code")


def merged(recipe: Recipe, ranks: int) -> dict[str, Any]:
    return merge_config(recipe, load_engine_config(recipe.engine), ranks)


def needed(recipe: Recipe, ranks: int = 8) -> float:
    return needed_bytes(recipe, merged(recipe, ranks), ranks, "cuda")


def printed(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """What the command prints about the paper's model."""
    plan(["--recipe", "paper_binary_code", *flags])
    return capsys.readouterr().out


def run_plan(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pretrain.plan", *flags]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES_DIR.glob("*.yaml")))
def test_every_recipe_can_be_planned_on_one_gpu(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plan(["--recipe", name, "--device", "mi300x", *overrides_of(name)])
    printed = capsys.readouterr().out
    assert all(mode in printed for mode in MODES)


def test_the_larger_siblings_fit_eight_gpus_of_80_gb_as_they_are() -> None:
    for name in ("binary_code_1b3", "binary_code_3b"):
        recipe = load_recipe(name)
        check_it_fits(recipe, merged(recipe, 8), 8, 80e9)


def test_a_plan_says_what_is_assumed_and_what_it_comes_to() -> None:
    result = run_plan(
        "--recipe",
        "paper_binary_code",
        "--device",
        "h200",
        "--mfu",
        "0.5",
        "--price-per-gpu-hour",
        "2",
    )
    assert "470,190,080 trained, 0 of them in the input" in result.stdout
    assert "3.020 G a token = 6 x (12 L D^2 + V D) + 6 L T D" in result.stdout
    assert "checkpoint   5.64 GB" in result.stdout
    assert "data set     34.00 GB" in result.stdout
    assert "an assumption" in result.stdout
    hours = float(re.search(r"([\d.]+) GPU-hours", result.stdout)[1])  # type: ignore[index]
    # 17e9 tokens x 3.02 GFLOP at half of 989 TFLOP/s: 28.8 hours, and the updates
    assert 28 <= hours <= 31


def test_a_plan_of_a_data_set_says_how_often_it_is_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = counting_dataset(tmp_path / "dataset")
    plan(["--recipe", "quickstart", "--device", "l4", "--data-dir", str(data)])
    assert "of training tokens, seen" in capsys.readouterr().out


def test_a_plan_loads_neither_torch_nor_deepspeed() -> None:
    program = "import sys, pretrain.plan; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert not {"torch", "deepspeed", "transformers"} & set(result.stdout.split())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--device", "h300"], "--device h300: not known; did you mean h200?"),
        (
            ["--device", "NVIDIA A100-SXM-64GB"],
            "not known; expected one of a100, a100 80gb, a100 pcie, a100 pcie 80gb (or",
        ),
        (
            ["--device", "h300", "--peak-tflops", "900"],
            "--device h300: not known; did you mean h200? (or give --peak",
        ),
        (
            ["--device", "h300", "--peak-tflops", "900", "--memory-gb", "0"],
            "--memory-gb 0.0: expected a number above",
        ),
        (
            ["--device", "h200", "--peak-tflops", "nan"],
            "--peak-tflops nan: expected a number above 0",
        ),
        (
            ["--device", "cpu", "--peak-tflops", "1"],
            "--device cpu: --peak-tflops and --memory-gb are for GPUs",
        ),
        (["--device", "cpu"], "add --calibrate"),
        (["--device", "h200", "--gpus", "0"], "--gpus 0: expected a number above 0"),
        (["--device", "h200", "--gpus", "7"], "does not divide over 7 ranks"),
        (["--device", "h200", "--mfu", "35"], "--mfu 35.0: expected a number above 0, at most 1"),
        (["--device", "h200", "--mfu", "nan"], "--mfu nan: expected a number above 0"),
        (
            ["--device", "h200", "--price-per-gpu-hour", "-1"],
            "--price-per-gpu-hour -1.0: expected a number above 0",
        ),
        (["--device", "h200", "--interconnect", "ndrr"], "--interconnect ndrr: did you mean ndr?"),
        (
            ["--device", "h200", "--interconnect", "1,2,3"],
            "expected GB/s above 0, within a node and between nodes",
        ),
        (["--device", "h200", "--interconnect", "0"], "expected GB/s above 0"),
        (["--device", "h200", "--mfu", "0.4", "--calibrate"], "not allowed with argument"),
        (
            ["--device", "rtx 4090", "--gpus", "8"],
            "GB too much; what fits: batch.micro_batch_size 8 with",
        ),
    ],
)
def test_what_cannot_be_planned_gets_one_line(flags: list[str], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        plan(["--recipe", "paper_binary_code", *flags])


def test_a_device_that_nobody_knows_is_planned_by_its_figures(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As if it were a known one, but for the update's memory traffic, of which the output says
    that it is left out.
    """

    def planned(*flags: str) -> str:
        plan(["--recipe", "paper_binary_code", "--interconnect", "nvlink4,ndr", *flags])
        return capsys.readouterr().out

    known = planned("--device", "h200")
    given = planned("--device", "NVIDIA H999", "--peak-tflops", "989.5", "--memory-gb", "141")
    assert "1 x 1 NVIDIA H999, peak 990 TFLOP/s" in given
    assert (
        "the memory bandwidth of NVIDIA H999 is not known: the update's traffic is left out"
        in given
    )
    memory_of = [
        text[text.index("memory of a rank") : text.index("speed ")] for text in (known, given)
    ]
    assert memory_of[0] == memory_of[1]
    speeds = [
        float(text.split("speed")[1].split(" tokens/s")[0].replace(",", ""))
        for text in (known, given)
    ]
    assert speeds[0] < speeds[1] < 1.01 * speeds[0]


def test_a_figure_that_was_given_takes_the_place_of_the_known_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan(["--recipe", "paper_binary_code", "--device", "a100", "--memory-gb", "64"])
    printed = capsys.readouterr().out
    assert "1 x 1 a100, peak 312 TFLOP/s" in printed
    size = largest_micro_batch(sizes_of(PAPER, merged(PAPER, 1), 1, "cuda"), 64e9, "none")
    assert f"{size}\n" in next(
        line + "\n" for line in printed.splitlines() if line.startswith("  none")
    )


def test_bad_input_is_one_line_and_exit_code_2() -> None:
    result = run_plan("--recipe", "paper_binary_code", "--device", "h300")
    assert result.returncode == 2
    assert result.stderr == (
        "error: --device h300: not known; did you mean h200? (or give --peak-tflops and "
        "--memory-gb)\n"
    )


def test_what_is_said_to_fit_does_and_the_next_larger_does_not() -> None:
    for mode in MODES:
        size = largest_micro_batch(sizes_of(PAPER, merged(PAPER, 4), 4, "cuda"), 24e9, mode)
        assert size is not None
        assert needed(with_micro_batch(PAPER, size, mode), 4) <= 24e9
        assert size == 128 or needed(with_micro_batch(PAPER, 2 * size, mode), 4) > 24e9


def test_too_little_memory_says_how_much_is_missing() -> None:
    short = needed(PAPER) - 0.25e9
    with pytest.raises(UserError, match=r"0\.2 GB too much|0\.3 GB too much"):
        check_it_fits(PAPER, merged(PAPER, 8), 8, short)
    with pytest.raises(UserError, match="what fits: nothing"):
        check_it_fits(PAPER, merged(PAPER, 8), 8, 1e9)


def test_memory_falls_with_ranks_and_with_checkpointing_and_grows_with_the_micro_batch() -> None:
    by_ranks = [needed(PAPER, ranks) for ranks in (1, 2, 4, 8)]
    assert by_ranks == sorted(by_ranks, reverse=True)
    by_mode = [needed(with_micro_batch(PAPER, 16, mode)) for mode in MODES]
    assert by_mode == sorted(by_mode, reverse=True)
    by_size = [needed(with_micro_batch(PAPER, size, "none")) for size in (4, 8, 16, 32)]
    assert by_size == sorted(by_size)


def test_a_rank_in_fp32_counts_the_parameters_whole_of_which_it_owns_a_part() -> None:
    assert whole_parameters([10, 10, 10, 10], 1) == 40
    assert whole_parameters([10, 10, 10, 10], 2) == 20
    # the second rank owns a third of one and all of the other
    assert whole_parameters([30, 10], 2) == 40
    assert whole_parameters([40], 4) == 40


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("engine", ["zero2_fp32", "zero2_bf16"])
def test_activations_are_the_bytes_that_a_model_keeps_for_its_backward_pass(
    engine: str, mode: str
) -> None:
    """One layer more keeps as many bytes more as the plan says: counted in the tensors that
    autograd holds.
    """
    overrides = [
        "--model.vocab_size=64",
        "--model.d_model=64",
        "--model.num_heads=2",
        "--model.seq_len=64",
    ]
    overrides += [
        "--batch.global_batch_tokens=256",
        "--batch.micro_batch_size=4",
        f"--engine={engine}",
    ]
    recipe = load_recipe("quickstart", [*overrides, f"--activation_checkpointing.mode={mode}"])
    dtype = torch.bfloat16 if engine == "zero2_bf16" else torch.float32
    kept = bytes_alive_after_forward(recipe, 5, dtype) - bytes_alive_after_forward(recipe, 2, dtype)
    sizes = sizes_of(recipe, merged(recipe, 1), 1, "cpu")
    assert kept == pytest.approx(activation_bytes(sizes, 5) - activation_bytes(sizes, 2), rel=0.02)


def load_deeper(recipe: Recipe, layers: int) -> Recipe:
    return replace(recipe, model=replace(recipe.model, num_layers=layers))  # type: ignore[type-var]


def bytes_alive_after_forward(recipe: Recipe, layers: int, dtype: torch.dtype) -> int:
    """What torch's CPU allocator has handed out and not got back while the graph of a forward
    pass lives.
    """
    from torch._C._profiler import _EventType
    from torch.profiler import ProfilerActivity, profile

    from pretrain.model.build import build_model

    model = build_model(load_deeper(recipe, layers))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    ids_BT = torch.zeros(recipe.batch.micro_batch_size, recipe.model.seq_len, dtype=torch.long)
    model.model.hidden_states(ids_BT)  # what the first pass caches is no activation
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        hidden_BTD = model.model.hidden_states(ids_BT)
    alive, nodes = 0, list(profiler.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    while nodes:
        node = nodes.pop()
        nodes += node.children
        alive += node.extra_fields.alloc_size if node.tag == _EventType.Allocation else 0
    del hidden_BTD
    return int(alive)


def test_the_loss_head_s_chunk_is_that_of_the_loss_head() -> None:
    for device, ranks in (("cpu", 1), ("cuda", 8)):
        sizes = sizes_of(PAPER, merged(PAPER, ranks), ranks, device)
        rows = chunk_tokens(PAPER.model.vocab_size, device)
        gradients = 4 * (65_536 * 1024 + 16 * 1024 * 1024)
        copies = 4 * 65_536 * 1024 if device == "cpu" else 2 * rows * 65_536
        assert loss_head_bytes(sizes) == 8 * rows * 65_536 + gradients + copies


def test_fewer_windows_than_a_micro_batch_accumulate_less() -> None:
    costs = Costs(window=0.01, reduced_parameter=0.0, updated_parameter=0.0)
    sizes = sizes_of(PAPER, merged(PAPER, 1), 1, "cuda")
    scale = scale_to(sizes, costs, 64, 1e12)
    assert (scale.micro_batch_size, scale.accumulation) == (8, 1)  # 512 windows
    assert scale.needed_bytes == needed(with_micro_batch(PAPER, 8, "none"), 64)


def test_gpus_that_a_step_does_not_divide_over_are_one_line_with_the_batch_that_does(
    capsys: pytest.CaptureFixture[str],
) -> None:
    *_, last = printed(capsys, "--device", "h200").splitlines()
    assert last.startswith(" 1024+  a step's 512 windows do not divide")
    tokens = re.search(r"batch.global_batch_tokens (\d+)", last)[1]  # type: ignore[index]
    *_, last = printed(
        capsys, "--device", "h200", f"--batch.global_batch_tokens={tokens}"
    ).splitlines()
    assert last.startswith("  1024        1 x 1")


def test_what_does_not_fit_on_few_gpus_has_no_speed_and_efficiency_counts_from_the_first_that_fits(
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan(["--recipe", "binary_code_3b", "--device", "h100", "--gpus", "8"])
    one, two = re.findall(r"^ +[12]  .*$", capsys.readouterr().out, re.MULTILINE)
    assert (
        one.split(maxsplit=1)[1]
        == f"does not fit: needs {needed(load_recipe('binary_code_3b'), 1) / 1e9:.1f} GB of 80.0"
    )
    assert "100%" in two


def test_the_speed_of_fp32_and_of_an_offloaded_optimizer_is_not_made_up(
    capsys: pytest.CaptureFixture[str],
) -> None:
    fp32 = ("--device", "h200", "--engine=zero2_fp32", "--batch.micro_batch_size=4")
    assert "not estimated: the peak is bf16's and this run is fp32" in printed(capsys, *fp32)
    assert "computing at 4% MFU" in printed(capsys, *fp32, "--mfu", "0.04")
    offload = ("--device", "h200", "--engine=zero2_bf16_offload", "--mfu", "0.4")
    said = printed(capsys, *offload)
    assert "not estimated: host and bus decide" in said
    assert "activations" in said
    assert "tokens/s" not in said


def test_a_step_s_time_is_that_of_the_formula() -> None:
    costs, config, parameters = (
        Costs(window=1.0, reduced_parameter=2e-9, updated_parameter=3e-9),
        merged(PAPER, 1),
        470_190_080,
    )
    assert step_seconds(
        PAPER, config, costs, Spread(ranks=1, accumulation=32, bytes_per_s=1.0)
    ) == pytest.approx(512 + parameters * (32 * 2e-9 + 3e-9))
    on_four = Spread(ranks=4, accumulation=8, bytes_per_s=1e9)
    # eight all-reduces of fp32 gradients, one gathering of bf16
    wire = 3 / 4 * parameters * (8 * 2 * 4 + 2) / 1e9
    local = parameters * (8 * 2e-9 + 3e-9 / 4)
    assert step_seconds(PAPER, config, costs, on_four) == pytest.approx(128 + local + wire)
    once = {**config, "zero_optimization": {**config["zero_optimization"], "stage": 1}}
    wire_once = 3 / 4 * parameters * (2 * 4 + 2) / 1e9
    assert step_seconds(PAPER, once, costs, on_four) == pytest.approx(128 + local + wire_once)
    overlapping = {
        **config,
        "zero_optimization": {**config["zero_optimization"], "overlap_comm": True},
    }
    hidden = min(2 / 3 * 128, 3 / 4 * parameters * 64 / 1e9)
    assert step_seconds(PAPER, overlapping, costs, on_four) == pytest.approx(
        128 + local + wire - hidden
    )


def test_an_interconnect_is_names_or_figures_of_which_four_fifths_are_reached() -> None:
    assert parse_interconnect("nvlink4,ndr") == pytest.approx((360e9, 40e9))
    assert parse_interconnect("100") == pytest.approx((80e9, 80e9))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        # 8 network cards of 40, together
        (["--device", "h200"], "360 GB/s a rank in a node of 8, 320 beyond"),
        (["--device", "a100", "--gpus", "4"], "240 GB/s a rank in a node of 8, 240 beyond"),
        (["--device", "mi300x", "--gpus", "16"], "358.4 GB/s a rank in a node of 16, 358.4 beyond"),
        (
            ["--device", "l40s", "--gpus", "2", "--nodes", "2"],
            "25.6 GB/s a rank in a node of 2, 25.6 beyond",
        ),
        (["--device", "h200", "--nodes", "2"], "360 GB/s a rank in a node of 1, 40 beyond"),
        (
            ["--device", "h200", "--interconnect", "100,1"],
            "80 GB/s a rank in a node of 8, 6.4 beyond",
        ),
    ],
)
def test_ranks_send_over_their_device_s_link_in_a_node_and_over_all_its_network_cards_beyond(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"assumed: {said}" in printed(capsys, *flags)


def test_which_link_a_row_has_depends_on_the_node_alone(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        re.findall(r"^ +8  .*$", printed(capsys, "--device", "h100", "--gpus", gpus), re.MULTILINE)
        for gpus in ("1", "8")
    ]
    assert rows[0] == rows[1]


def test_every_device_has_a_link_that_is_known() -> None:
    assert {device.link for device in DEVICES} <= LINKS.keys()


def test_an_offloaded_optimizer_leaves_the_device() -> None:
    config = merged(PAPER, 1)
    config["zero_optimization"] = {
        **config["zero_optimization"],
        "offload_optimizer": {"device": "cpu"},
    }
    own = phase_bytes(sizes_of(PAPER, merged(PAPER, 1), 1, "cuda"))
    offloaded = phase_bytes(sizes_of(PAPER, config, 1, "cuda"))
    assert own["blocks, backward"] - offloaded["blocks, backward"] == 12 * 470_190_080


def test_measured_memory_is_within_a_tenth_of_the_plan() -> None:
    command = [sys.executable, "tests/benchmarks/plan_accuracy.py", "--quick", "--memory-only"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    (ratio,) = re.findall(r"\| ([\d.]+) \|$", result.stdout, re.MULTILINE)
    assert 0.9 <= float(ratio) <= 1.1, result.stdout


def test_calibration_measures_this_machine() -> None:
    tiny = [
        "--model.vocab_size=64",
        "--model.seq_len=32",
        "--model.num_layers=2",
        "--batch.global_batch_tokens=192",
    ]
    recipe = load_recipe("quickstart", tiny)
    costs = calibrate(recipe, None, low_precision=False, budget_s=0.1)
    deeper = calibrate(load_deeper(recipe, 40), None, low_precision=False, budget_s=0.1)
    assert 0 < costs.reduced_parameter < costs.updated_parameter
    assert 0 < costs.window < deeper.window


def test_a_rank_is_calibrated_on_its_part_of_the_cpu() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        recipe = load_recipe("quickstart", ["--model.vocab_size=64", "--model.seq_len=32"])
        calibrate(recipe, None, low_precision=False, ranks=2, budget_s=0.0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine may have the device")
def test_a_device_that_is_not_here_is_not_calibrated_and_nothing_is_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(UserError, match="which is not h200; run it there"):
        plan(["--recipe", "paper_binary_code", "--device", "h200", "--calibrate"])
    assert not capsys.readouterr().out
