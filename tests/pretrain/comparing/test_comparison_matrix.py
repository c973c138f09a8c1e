"""The matrix of a comparison: its cells, their names, and what can't be compared."""

import re
import shlex
from pathlib import Path

import pytest
from support.runs import REPOSITORY, overrides_of, write_recipe

from data_prep.errors import UserError
from pretrain import compare, plan
from pretrain.comparing.cost import dry_run_page, find_machine
from pretrain.comparing.matrix import Asked, Matrix, build_matrix, show_value
from pretrain.config.changes import MAY_CHANGE_ON_RESUME
from pretrain.config.load import dotted_keys
from pretrain.config.recipe import Recipe

INPUTS = "model.input_embedding=binary_code,learned"
SEEDS = "seed=1,2,3"


def matrix_of(
    *vary: str, baseline: str | None = None, recipe: str = "compare_small", flags: str = ""
) -> Matrix:
    """The matrix of a shipped recipe."""
    overrides = (*overrides_of(recipe), *flags.split())
    asked = Asked(
        recipe=recipe, data_dir=Path("none"), vary=vary, baseline=baseline, overrides=overrides
    )
    return build_matrix(asked)


def test_cells_are_all_combinations_the_first_seed_first() -> None:
    matrix = matrix_of(INPUTS, SEEDS, baseline="model.input_embedding=learned")
    names = [cell.name for cell in matrix.cells]
    assert names[:3] == [
        "input_embedding=binary_code,seed=1",
        "input_embedding=learned,seed=1",
        "input_embedding=binary_code,seed=2",
    ]
    assert len(set(names)) == 6
    assert (matrix.treatment, matrix.baseline) == ("model.input_embedding", "learned")
    assert [len(group) for group in matrix.groups()] == [6]
    recipes = [cell.recipe for cell in matrix.cells]
    assert [recipe.seed for recipe in recipes] == [1, 1, 2, 2, 3, 3]
    assert {recipe.model.input_embedding for recipe in recipes} == {"binary_code", "learned"}


def test_what_is_neither_seed_nor_treatment_makes_groups() -> None:
    matrix = matrix_of(
        "train_tokens=1e6,2e6",
        "seed=4,5",
        "model.num_layers=2,4",
        INPUTS,
        baseline="model.input_embedding=binary_code",
    )
    groups = matrix.groups()
    assert len(matrix.cells) == 16
    assert [matrix.group_of(group[0]) for group in groups] == [
        {"train_tokens": tokens, "model.num_layers": layers}
        for tokens in (1_000_000, 2_000_000)
        for layers in (2, 4)
    ]
    for group in groups:
        assert sorted(cell.seed for cell in group) == [4, 4, 5, 5]


def test_a_cell_keeps_its_name_when_others_come_to_it() -> None:
    few = {cell.name for cell in matrix_of(INPUTS, "seed=1").cells}
    more = {cell.name for cell in matrix_of(f"{INPUTS},affine_code", "seed=2,1").cells}
    assert few < more


def test_numbers_are_the_recipe_s_however_they_are_written() -> None:
    matrix = matrix_of(
        "optimizer.peak_learning_rate=3e-4,0.001",
        baseline="optimizer.peak_learning_rate=1e-3",
    )
    assert [cell.name for cell in matrix.cells] == [
        "peak_learning_rate=0.0003",
        "peak_learning_rate=0.001",
    ]
    assert matrix.baseline == 0.001
    masked = matrix_of("intra_document_masking=true,false", "model.code_bits=null,16")
    assert masked.cells[0].name == "intra_document_masking=true,code_bits=null"
    assert show_value(masked.cells[-1].settings["intra_document_masking"]) == "false"


@pytest.mark.parametrize(
    ("vary", "baseline", "flags", "expected"),
    [
        ([], None, "", "nothing varies"),
        (["seed"], None, "", "--vary seed: expected KEY=V1,V2"),
        (["seed=1,,2"], None, "", "--vary seed=1,,2: expected KEY=V1,V2"),
        (["lr=1e-3"], None, "", "unknown key; did you mean optimizer.peak_learning_rate?"),
        (["model.d_modl=9"], None, "", "unknown key; did you mean model.d_model?"),
        (["model=9"], None, "", "--vary model: a section"),
        (["model.vocab_size=9"], None, "", "can't be compared over it"),
        (["seed=1", "seed=2"], None, "", "--vary seed: given twice"),
        (["seed=1"], None, "--seed=2", "--vary seed: also set with --seed="),
        (["train_tokens=1e5,100000"], None, "", "1e5 and 100000 are the same value"),
        (["seed=1,one"], None, "", "seed: got 'one'; expected a whole number"),
        ([INPUTS.replace("learned", "table")], None, "", "model.input_embedding: got 'table'"),
        (
            [INPUTS, "model.d_model=128,120"],
            None,
            "",
            "code_bits 16 does not divide model.d_model 120",
        ),
        (["seed=1"], None, "--lr=3", "unknown key lr"),
        (["seed=1"], None, "--lr", "--lr: not a known flag"),
        ([SEEDS], "seed=1", "", "--baseline seed: seeds make pairs"),
        ([SEEDS], "model.d_model=128", "", "--baseline model.d_model: does not vary"),
        ([INPUTS], "model.input_embedding", "", "--baseline model.input_embedding: expected KEY="),
        (
            [INPUTS],
            "model.input_embedding=affine_code",
            "",
            "is not among its values; expected one of binary_code, learned",
        ),
        (["seed=" + ",".join(map(str, range(2000)))], None, "", "2,000 cells, expected 1,000"),
    ],
)
def test_what_can_t_be_compared_is_refused_in_one_line(
    vary: list[str], baseline: str | None, flags: str, expected: str
) -> None:
    with pytest.raises(UserError, match=re.escape(expected)) as refused:
        matrix_of(*vary, baseline=baseline, flags=flags)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "key",
    sorted(
        key
        for key in dotted_keys(Recipe)
        if key in MAY_CHANGE_ON_RESUME or key.partition(".")[0] in MAY_CHANGE_ON_RESUME
    ),
)
def test_keys_that_change_nothing_that_is_learned_can_t_vary(key: str) -> None:
    with pytest.raises(UserError, match=r"--vary .* can't be compared over it"):
        matrix_of(f"{key}=1,2")


# What it will cost


def test_a_dry_run_counts_what_cells_take() -> None:
    matrix = matrix_of(INPUTS, "seed=1,2", baseline="model.input_embedding=learned")
    page = dry_run_page(matrix, None)
    assert "4 cells in 1 group, each compared with model.input_embedding=learned" in page
    of_cells = [line.split() for line in page.splitlines() if line.startswith("input_embedding=")]
    table = 4096 * 128
    learned, code = (int(of_cells[row][1].replace(",", "")) for row in (1, 0))
    assert learned - code == table
    tokens = {int(cells[2].replace(",", "")) for cells in of_cells}
    assert f"together: {4 * tokens.pop():,} tokens" in page


def test_the_paper_s_matrix_has_hours_and_a_price() -> None:
    """As pretrain.plan has them: both follow from pretrain/costs."""
    matrix = matrix_of(
        "model.input_embedding=binary_code,affine_code,learned",
        SEEDS,
        baseline="model.input_embedding=learned",
        recipe="paper_learned",
    )
    page = dry_run_page(matrix, find_machine("h200", 8, 3.0))
    (total,) = (line for line in page.splitlines() if line.startswith("together: "))
    found = re.search(r"([\d.e+]+) hours, ([\d.e+]+) GPU hours, price ([\d,.]+)", total)
    assert found
    hours, gpu_hours, price = (float(text.replace(",", "")) for text in found.groups())
    assert gpu_hours == pytest.approx(8 * hours, rel=0.01)
    assert price == pytest.approx(3 * gpu_hours, rel=0.01)
    recipe = matrix.cells[0].recipe
    flops = 9 * recipe.total_steps * recipe.batch.global_batch_tokens * 6 * 470e6
    assert 1.0 < gpu_hours * 3600 * 0.35 * 989e12 / flops < 1.3  # at an MFU of 35 % of an H200


def test_the_readme_s_commands_say_what_the_readme_says(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As they stand there; those that would train show what they would."""
    readme = (REPOSITORY / "pretrain" / "README.md").read_text(encoding="utf-8")
    section = readme[readme.index("## Comparing") : readme.index("## Checkpoints")]
    blocks = re.findall(r"```\n(python -m pretrain\.compare .*?)```", section, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        _, _, _, *arguments = shlex.split(block.replace("\\\n", " "))
        compare.main([*arguments, "--dry-run"])
    small, after = capsys.readouterr().out.split("paper_learned: ")
    assert small.startswith("compare_small: 12 cells in 1 group")
    paper, gap = after.split("compare_small: ")
    assert paper.startswith("12 cells")
    assert ", 529 GPU hours" in paper
    assert gap.startswith("18 cells in 3 groups")
    assert "529 GPU hours" in section


def test_hours_are_those_of_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    matrix = matrix_of("seed=1", recipe="paper_binary_code")
    page = dry_run_page(matrix, find_machine("h200", 8, 3.0))
    (hours,) = re.findall(r" ([\d.]+) hours, ", page)
    plan.plan(["--recipe", "paper_binary_code", "--device", "h200", "--gpus", "8"])
    assert f" {hours} hours," in capsys.readouterr().out


def test_a_device_that_is_not_known_is_refused() -> None:
    with pytest.raises(UserError, match="--device h20: not known; did you mean"):
        find_machine("h20", 1, None)
    matrix = matrix_of("seed=1", flags="--batch.global_batch_tokens=4096")
    machine = find_machine("h200", 7, None)
    with pytest.raises(UserError, match=r"^seed=1: a step of 32 windows does not divide"):
        dry_run_page(matrix, machine)


def test_a_recipe_by_its_path_is_as_good_as_a_shipped_one(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "tiny.yaml")
    matrix = matrix_of("seed=1,2", recipe=str(recipe))
    assert [cell.recipe.model.d_model for cell in matrix.cells] == [48, 48]
