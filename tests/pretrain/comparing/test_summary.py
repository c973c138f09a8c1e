"""What is made of cells' figures: groups, differences, sentences, images, the file."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.browser import chromium
from support.damage import damaged
from support.written_runs import falling_steps, write_run

from data_prep.errors import UserError
from pretrain.comparing.cells import CELLS_NAME, Place
from pretrain.comparing.comparison import (
    Comparison,
    Missing,
    read_comparison,
    write_comparison,
)
from pretrain.comparing.gap import AXES, draw_gaps, lines_over
from pretrain.comparing.matching import Match, initial_digests, match_cells
from pretrain.comparing.matrix import Asked, Matrix, build_matrix
from pretrain.comparing.measured import CellFigures
from pretrain.comparing.results import data_url
from pretrain.comparing.summary import summarise
from pretrain.comparing.words import (
    findings_of,
    markdown_of,
    reservations_of,
    sections_of,
    sentence_of,
    tables_of,
)
from pretrain.costs.flops import count_parameters
from pretrain.evaluation.documents import DocumentScores, documents_path, write_documents
from pretrain.evaluation.result import Score
from pretrain.metrics.step_record import perplexity_of
from pretrain.reporting.page import report_page
from pretrain.reporting.reading import read_runs
from pretrain.reporting.words import Image

TARGETS = 1_000
TEXT_BYTES = 4_000
BITS_OF_NAT = TARGETS / (math.log(2) * TEXT_BYTES)
GAP_OF = {"learned": 0.0, "binary_code": 0.4, "affine_code": 0.0}
NOISE = {1: -0.02, 2: 0.03, 3: 0.01}  # of a seed, which all its cells share
OWN = {1: 0.001, 2: -0.002, 3: 0.004}  # of the pairs' differences


def matrix_of(*vary: str, baseline: str | None = "model.input_embedding=learned") -> Matrix:
    asked = Asked(
        recipe="compare_small", data_dir=Path("none"), vary=vary, baseline=baseline, overrides=()
    )
    return build_matrix(asked)


def figures_of(matrix: Matrix) -> list[CellFigures]:
    """Figures by formula: what seeds share, and what they don't, is known."""
    cells = []
    for cell in matrix.cells:
        recipe = cell.recipe
        value = recipe.model.input_embedding
        loss = 4.0 + NOISE[cell.seed] + GAP_OF[value] * 1_228_800 / recipe.train_tokens
        if value != "learned":
            loss += OWN[cell.seed]
        parts = count_parameters(recipe.model)
        score = Score(
            targets=TARGETS,
            text_bytes=TEXT_BYTES,
            loss=loss,
            perplexity=perplexity_of(loss),
            bits_per_byte=loss * BITS_OF_NAT,
        )
        cells.append(
            CellFigures(
                name=cell.name,
                settings=cell.settings,
                seed=cell.seed,
                score=score,
                parameters=sum(parts.values()),
                parameters_without_table=sum(parts.values()) - parts["input_embedding"],
                train_tokens=recipe.train_tokens,
                tokens_per_s=1_000.0 + cell.seed,
                peak_memory_bytes=10**9,
                skipped_steps=0,
            )
        )
    return cells


def comparison_of(matrix: Matrix, home: Path) -> Comparison:
    figures = figures_of(matrix)
    place = Place(output_dir=home, data_dir=home, recipe="compare_small")
    return Comparison(
        recipe="compare_small",
        data_dir=str(home),
        fingerprint="f" * 32,
        keys=matrix.keys,
        treatment=matrix.treatment,
        baseline=matrix.baseline,
        cells=tuple(figures),
        missing=(Missing(name="a cell", why="it failed"),),
        groups=tuple(summarise(matrix, place, figures)),
        matches=(),
    )


THREE = "model.input_embedding=learned,binary_code,affine_code"


def test_what_seeds_share_does_not_blur_a_difference(tmp_path: Path) -> None:
    """Losses of a treatment spread by 0.025, differences of pairs by 0.003."""
    comparison = comparison_of(matrix_of(THREE, "seed=1,2,3"), tmp_path)
    (group,) = comparison.groups
    by_value = {one.value: one for one in group.differences}
    assert set(by_value) == {"binary_code", "affine_code"}
    code = by_value["binary_code"]
    assert code.loss == pytest.approx(0.4 + np.mean(list(OWN.values())))
    assert code.bits_per_byte == pytest.approx(code.loss * BITS_OF_NAT)
    assert code.over_seeds is not None
    assert code.over_seeds.deviation == pytest.approx(np.std(list(OWN.values()), ddof=1))
    assert code.over_seeds.interval_bits.low == pytest.approx(
        code.over_seeds.interval.low * BITS_OF_NAT
    )
    learned = next(one for one in group.treatments if one.value == "learned")
    assert learned.loss.deviation == pytest.approx(np.std(list(NOISE.values()), ddof=1))
    # of two treatments Holm doubles the smaller p value
    assert code.over_seeds.p_holm == pytest.approx(2 * code.over_seeds.p_value)
    assert code.over_seeds.is_seen
    affine = by_value["affine_code"].over_seeds
    assert affine is not None
    assert affine.p_holm == affine.p_value


def test_sentences_say_what_was_seen_and_what_could_have_been(tmp_path: Path) -> None:
    comparison = comparison_of(matrix_of(THREE, "seed=1,2,3"), tmp_path)
    sentences = findings_of(comparison, comparison.groups[0]).sentences
    (code,) = (line for line in sentences if line.startswith("binary_code against learned"))
    # 0.003 times 4.63, which the noncentral t gives for 3 pairs at 0.05 / 2, of a loss of 4.007
    assert "3 seeds can show a difference of 0.35 % or more at this spread" in code
    assert "one was seen, more loss: +10.0" in code
    assert "To see 1 % would take 3 seeds." in code
    (affine,) = (line for line in sentences if line.startswith("affine_code against learned"))
    assert "none was seen: +0.02 %" in affine
    (reservation,) = reservations_of(comparison)
    assert reservation.startswith("A difference that was not seen may still be there")
    assert reservation in markdown_of(comparison, [])
    groups = matrix_of(THREE, "seed=1,2", "train_tokens=1e6,2e6")
    assert "Each group is tested by itself" in reservations_of(comparison_of(groups, tmp_path))[1]


def test_what_one_treatment_alone_would_show_and_several_do_not_is_told_apart(
    tmp_path: Path,
) -> None:
    comparison = comparison_of(matrix_of(THREE, "seed=1,2,3"), tmp_path)
    (code,) = (one for one in comparison.groups[0].differences if one.value == "binary_code")
    assert code.over_seeds is not None
    between = replace(code.over_seeds, p_value=0.03, p_holm=0.06)
    sentence = sentence_of(comparison, replace(code, over_seeds=between))
    assert "none was seen among so many treatments" in sentence
    assert "(of this treatment alone one would be, p 0.03): +10.0" in sentence
    assert "p 0.06 by Holm" in sentence


def test_one_seed_has_figures_and_no_interval_and_that_is_said(tmp_path: Path) -> None:
    comparison = comparison_of(matrix_of(THREE, "seed=1"), tmp_path)
    (group,) = comparison.groups
    assert all(one.over_seeds is None for one in group.differences)
    sentences = findings_of(comparison, group).sentences
    assert "One seed tells no spread" in sentences[-1]
    assert "what chance it owes is not known" in sentences[0]
    nothing = comparison_of(matrix_of(THREE, "seed=1,2", baseline=None), tmp_path)
    assert not nothing.groups[0].differences
    assert findings_of(nothing, nothing.groups[0]).sentences == (
        "No --baseline was named, so nothing is compared: figures alone.",
    )


def test_the_file_reads_back_equal(tmp_path: Path) -> None:
    comparison = comparison_of(matrix_of(THREE, "seed=1,2,3"), tmp_path)
    write_comparison(comparison, tmp_path)
    assert read_comparison(tmp_path) == comparison
    path = tmp_path / "comparison.json"
    path.write_text(path.read_text().replace('"loss"', '"los"'))
    with pytest.raises(UserError, match=r"comparison\.json: .*missing; move it away"):
        read_comparison(tmp_path)


@given(st.data())
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "comparison.json"
    if not (tmp_path / "whole").exists():
        comparison = comparison_of(matrix_of(THREE, "seed=1,2"), tmp_path)
        (tmp_path / "whole").write_bytes(comparison.to_json())
    path.write_bytes(data.draw(damaged((tmp_path / "whole").read_bytes())))
    said = str(path)
    try:
        read_comparison(tmp_path)
    except UserError as error:
        said = str(error)
    assert str(path) in said
    assert "\n" not in said


def test_markdown_has_a_row_of_as_many_cells_as_its_header(tmp_path: Path) -> None:
    comparison = comparison_of(matrix_of(THREE, "seed=1,2,3"), tmp_path)
    for table in tables_of(comparison):
        for row in table.rows:
            assert len(row) == len(table.header)
    markdown = markdown_of(comparison, ["gap.png"])
    assert "![gap.png](gap.png)" in markdown
    assert "- a cell: it failed" in markdown
    assert "| binary_code | 3 | +0.4010 | +10.01 % |" in markdown


def test_documents_of_a_seed_give_an_interval_of_their_own(tmp_path: Path) -> None:
    matrix = matrix_of("model.input_embedding=learned,binary_code", "seed=1,2")
    random = np.random.default_rng(1)
    targets = random.integers(20, 80, 30)
    for cell in matrix.cells:
        gap = GAP_OF[cell.recipe.model.input_embedding]
        scores = DocumentScores(
            nats=(4.0 + gap) * targets,
            targets=targets,
            text_bytes=4 * targets,
            sources=("text",),
            source_of=np.zeros(30, np.int32),
        )
        result = tmp_path / CELLS_NAME / cell.name / "evaluation.json"
        result.parent.mkdir(parents=True)
        write_documents(scores, documents_path(result))
    comparison = comparison_of(matrix, tmp_path)
    (difference,) = comparison.groups[0].differences
    assert [found.seed for found in difference.over_documents] == [1, 2]
    for found in difference.over_documents:
        assert (found.documents, found.interval.low) == (30, pytest.approx(0.4))
    # another text in one of the cells
    path = documents_path(tmp_path / CELLS_NAME / matrix.cells[0].name / "evaluation.json")
    write_documents(replace(scores, targets=targets[::-1]), path)
    with pytest.raises(UserError, match="scored on other documents"):
        comparison_of(matrix, tmp_path)


def test_gaps_are_drawn_over_tokens_and_over_size(tmp_path: Path) -> None:
    matrix = matrix_of(
        "model.input_embedding=learned,binary_code",
        "seed=1,2,3",
        "train_tokens=409600,819200,1638400",
        "model.num_layers=2,4",
    )
    comparison = comparison_of(matrix, tmp_path)
    over_tokens, over_size = (lines_over(axis, comparison) for axis in AXES)
    assert [line.label for line in over_tokens] == [
        "binary_code, num_layers 2",
        "binary_code, num_layers 4",
    ]
    for line in over_tokens:
        assert [point.at for point in line.points] == [409_600, 819_200, 1_638_400]
        gaps = [point.difference.loss for point in line.points]
        assert gaps == pytest.approx(
            [0.4 * 1_228_800 / at + 0.001 for at in (409_600, 819_200, 1_638_400)]
        )
    assert len(over_size) == 3
    (table,) = (table for table in tables_of(comparison) if table.title.startswith("Gap to"))
    tokens = [row[1] for row in table.rows]
    assert tokens == [shown for shown in ("409,600", "819,200", "1,638,400") for _ in range(2)]
    difference = comparison.groups[0].differences[0]
    assert table.rows[0][3] == f"{difference.loss:+.4f}"
    assert difference.over_seeds is not None
    assert table.rows[0][6].startswith(f"{difference.over_seeds.interval_bits.low:+.4f} to ")
    gaps = draw_gaps(comparison, tmp_path)
    assert [gap.name for gap in gaps] == ["gap_over_tokens.png", "gap_over_parameters.png"]
    for gap in gaps:
        assert (tmp_path / gap.name).read_bytes() == gap.png
        assert gap.png.startswith(b"\x89PNG")
        assert (tmp_path / gap.name).with_suffix(".svg").read_bytes().startswith(b"<?xml")


def test_nothing_is_drawn_where_neither_varies(tmp_path: Path) -> None:
    comparison = comparison_of(matrix_of(THREE, "seed=1,2"), tmp_path)
    assert draw_gaps(comparison, tmp_path) == []
    assert not list(tmp_path.glob("gap*"))


# Matching


def place_of(matrix: Matrix, home: Path) -> Place:
    """Cells with the engine's configuration alone."""
    place = Place(output_dir=home, data_dir=home, recipe="compare_small")
    for cell in matrix.cells:
        place.run_dir(cell).mkdir(parents=True)
        (place.run_dir(cell) / "deepspeed.json").write_text('{"bf16": {"enabled": false}}')
    return place


def matches_of(matrix: Matrix, home: Path) -> list[Match]:
    place = place_of(matrix, home)
    return match_cells(matrix, [cell.name for cell in matrix.cells], place)


def test_cells_are_matched_unless_samples_weights_or_engine_differ(tmp_path: Path) -> None:
    matrix = matrix_of("model.input_embedding=learned,binary_code", "seed=1,2")
    matches = matches_of(matrix, tmp_path)
    assert [match.is_matched for match in matches] == [True, True]
    shared = {name.split(" ")[0] for name in initial_digests(matrix.cells[0].recipe)}
    assert matches[0].shared_parameters == len(shared) - 1  # all but the table
    longer = matrix_of("train_tokens=1e6,2e6", baseline="train_tokens=1e6")
    (match,) = matches_of(longer, tmp_path)
    assert match.samples is None
    assert not match.is_matched
    batches = matrix_of(
        "batch.global_batch_tokens=4096,8192", baseline="batch.global_batch_tokens=4096"
    )
    (match,) = matches_of(batches, tmp_path)
    assert match.samples == 9_600
    assert match.global_batch_tokens is None
    place = Place(output_dir=tmp_path, data_dir=tmp_path, recipe="compare_small")
    cell = matrix.cells[0]
    (place.run_dir(cell) / "deepspeed.json").write_text('{"bf16": {"enabled": true}}')
    matches = match_cells(matrix, [cell.name for cell in matrix.cells], place)
    assert [match.is_matched for match in matches] == [False, True]


def test_weights_that_differ_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By weights of one cell that come from another seed."""
    from pretrain.comparing import matching

    honest = initial_digests
    monkeypatch.setattr(
        matching,
        "initial_digests",
        lambda recipe: honest(
            replace(recipe, seed=9) if recipe.model.input_embedding == "learned" else recipe
        ),
    )
    matrix = matrix_of("model.input_embedding=learned,binary_code", "seed=1")
    (match,) = matches_of(matrix, tmp_path)
    assert match.weights is None
    assert not match.is_matched


# The page


def test_a_browser_shows_gaps_and_tables_and_complains_of_nothing(tmp_path: Path) -> None:
    """On a phone too, and by the rules of accessibility."""
    from axe_playwright_python.sync_playwright import Axe

    matrix = matrix_of(
        "model.input_embedding=learned,binary_code", "seed=1,2", "train_tokens=409600,819200"
    )
    comparison = comparison_of(matrix, tmp_path)
    gaps = draw_gaps(comparison, tmp_path)
    images = [Image(title=gap.title, source=data_url(gap.png)) for gap in gaps]
    runs = [
        write_run(tmp_path / f"{index}", falling_steps(30, index), cell.recipe)
        for index, cell in enumerate(matrix.cells[:4])
    ]
    path = tmp_path / "comparison.html"
    path.write_text(report_page(read_runs(runs, []), sections_of(comparison, images)))
    with chromium() as browser:
        page = browser.new_context(
            viewport={"width": 360, "height": 740}, bypass_csp=True
        ).new_page()
        seen: list[str] = []
        page.on("console", lambda message: seen.append(message.text))
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        (image,) = page.locator("section img").all()
        assert image.evaluate("image => image.naturalWidth") > 500
        assert "binary_code against learned: 2 seeds can show" in page.inner_text("main").replace(
            "\n", " "
        )
        found = Axe().run(page).response
        serious = [v for v in found["violations"] if v["impact"] in ("serious", "critical")]
        assert not serious, [(v["id"], v["nodes"][0]["html"]) for v in serious]
        assert seen == []
