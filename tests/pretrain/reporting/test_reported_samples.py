"""What a run generated while it trained, on the page: few enough, safe, and by keyboard."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.browser import chromium
from support.reports import EVIL, MEGABYTE, Words, look_at, page_of
from support.written_runs import falling_steps, recipe_of, skipped_step, write_run

from data_prep.errors import UserError
from pretrain.metrics.metrics_file import read_steps
from pretrain.metrics.step_columns import MOST_SAMPLED, read_columns
from pretrain.metrics.step_record import AnyStep, Sample

if TYPE_CHECKING:
    from playwright.sync_api import Browser


def sampled_steps(steps: int, every: int, text: str = "") -> Iterator[AnyStep]:
    """A run that generates after every so many steps."""
    for step in falling_steps(steps):
        done = step.step + 1
        if done % every:
            yield step
            continue
        first = Sample(prompt="Once", text=f" {done} times {EVIL}{text}", bits_per_byte=1.25)
        second = Sample(prompt="Never", text="", bits_per_byte=None)
        yield replace(step, samples=(first, second))


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    with chromium() as found:
        yield found


def test_a_line_with_samples_is_read_as_it_was_written(tmp_path: Path) -> None:
    steps = list(sampled_steps(6, 3))
    of_skipped = (Sample(prompt="a\nb", text="\ud800 é", bits_per_byte=0.5),)
    steps[4] = replace(skipped_step(4, "loss nan"), samples=of_skipped)
    run_dir = write_run(tmp_path / "run", steps, recipe_of(6))
    read = read_steps(run_dir)
    assert [step.samples for step in read] == [step.samples for step in steps]
    assert read[4].samples == of_skipped
    columns = read_columns(run_dir)
    assert [step.step for step in columns.sampled] == [2, 4, 5]
    assert columns.all_sampled == 3


@pytest.mark.parametrize(
    ("damaged", "words"),
    [
        (5, "'int' object is not iterable"),
        ([{"prompt": "a"}], "'text'"),
        ([{"prompt": "a", "text": 5}], "a sample that is no text"),
        ([{"prompt": "a", "text": "b", "bits_per_byte": "x"}], "that are no number"),
    ],
)
def test_a_line_with_damaged_samples_is_refused_by_its_number(
    damaged: object, words: str, tmp_path: Path
) -> None:
    run_dir = write_run(tmp_path / "run", falling_steps(3), recipe_of(3))
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[1] = json.dumps({**json.loads(lines[1]), "samples": damaged})
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=rf"metrics\.jsonl: line 2: damaged \(.*{words}"):
        page_of(tmp_path / "report.html", run_dir)


@pytest.mark.parametrize("validations", [1, 63, 64, 65, 1_000, 1_001])
def test_steps_are_thinned_out_evenly_and_the_last_one_stays(
    validations: int, tmp_path: Path
) -> None:
    run_dir = write_run(tmp_path / "run", sampled_steps(validations, 1), recipe_of(validations))
    columns = read_columns(run_dir)
    kept = [step.step for step in columns.sampled]
    assert columns.all_sampled == validations
    assert min(validations, MOST_SAMPLED // 2) <= len(kept) <= MOST_SAMPLED
    assert (kept[0], kept[-1]) == (0, validations - 1)
    gaps = {later - earlier for earlier, later in itertools.pairwise(kept[:-1])}
    assert len(gaps) <= 1


def test_ten_thousand_validations_of_long_texts_are_a_small_page(tmp_path: Path) -> None:
    steps = sampled_steps(10_000, 1, "<&>" * 300)
    run_dir = write_run(tmp_path / "run", steps, recipe_of(10_000))
    page = page_of(tmp_path / "report.html", run_dir)
    assert len(page.encode()) < 2 * MEGABYTE
    words = Words(page)
    shown = page.count('<div class="sampled')
    assert 10 < shown <= MOST_SAMPLED
    assert f"{shown} of 10,000 steps that have samples, evenly chosen." in words.cells
    assert "after step 1" in words.cells
    assert "after step 10,000" in words.cells


def test_more_prompts_than_there_is_room_for_are_cut_and_said(tmp_path: Path) -> None:
    (step,) = falling_steps(1)
    samples = tuple(
        Sample(prompt=f"{number} " + "x" * 900, text="é" * 2_000, bits_per_byte=1.0)
        for number in range(400)
    )
    run_dir = write_run(tmp_path / "run", [replace(step, samples=samples)], recipe_of(1))
    page = page_of(tmp_path / "report.html", run_dir)
    assert len(page.encode()) < MEGABYTE
    shown = page.count('<p class="sample">')
    assert 50 < shown < 400
    assert f"The first {shown} of 400 prompts." in Words(page).cells
    assert "é" * 1_000 + "…" in page
    assert "é" * 1_001 not in page


def test_a_step_is_picked_by_keyboard_and_markup_is_text(
    browser: "Browser", tmp_path: Path
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    path = tmp_path / "report.html"
    run_dir = write_run(tmp_path / "run", sampled_steps(60, 6), recipe_of(60))
    page_of(path, run_dir)
    phone = {"viewport": {"width": 360, "height": 740}, "bypass_csp": True}
    page, seen = look_at(browser, path, **phone)
    visible = page.locator(".sampled:visible")
    assert visible.count() == 1
    assert f"Once 60 times {EVIL}" in visible.inner_text()
    assert "1.250 bits per byte" in visible.inner_text()
    slider = page.get_by_role("slider", name="Samples")
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert "Once 54 times" in visible.inner_text()
    assert slider.get_attribute("aria-valuetext") == "after step 54"
    page.keyboard.press("Home")
    assert "Once 6 times" in visible.inner_text()
    assert page.title() == "run: report"
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    found = Axe().run(page).response
    serious = [v for v in found["violations"] if v["impact"] in ("serious", "critical")]
    assert not serious, [(v["id"], v["nodes"][0]["html"]) for v in serious]
    # On paper: a few, whichever was picked; and the recipe, which is folded, lies open.
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert visible.count() == 4
    assert page.get_by_text("peak_learning_rate: 0.01").is_visible()
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert not page.get_by_text("peak_learning_rate: 0.01").is_visible()
    assert seen == []
    page.context.close()


def test_without_a_script_some_steps_stand_there(browser: "Browser", tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    run_dir = write_run(tmp_path / "run", sampled_steps(60, 6), recipe_of(60))
    page_of(path, run_dir)
    page, _ = look_at(browser, path, java_script_enabled=False)
    headings = page.locator(".sampled:visible h4").all_inner_texts()
    assert headings == ["after step 6", "after step 24", "after step 42", "after step 60"]
    page.context.close()
