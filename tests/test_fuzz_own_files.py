"""Damage in any file of ours that a command reads: it works, or ends with its one line. No
traceback, no hang.

For the long form set FUZZ_CASES to 700: so many cases for each file, above 10,000 in all.
"""

import contextlib
import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.damage import damaged
from support.prep_helpers import build
from support.runs import write_recipe

from data_prep import show, verify
from data_prep.building.build_plan import Plan, make_plan
from data_prep.building.mixture import load_mixture
from data_prep.building.output_dir import is_complete
from data_prep.commands import exit_code
from data_prep.errors import UserError, parse_yaml
from data_prep.manifest import load_manifest
from data_prep.shards import ShardReader
from data_prep.tokenizer.load import load_tokenizer
from pretrain import trace
from pretrain.checkpoint.find import load_for_reading
from pretrain.checkpoint.layout import checkpoints_dir, saved_steps
from pretrain.checkpoint.reader import load_model
from pretrain.config.deepspeed import load_engine_config
from pretrain.config.load import build_recipe, load_recipe
from pretrain.distributed.world import World
from pretrain.evaluation.open_run import open_data
from pretrain.evaluation.result import read_result
from pretrain.metrics.metrics_file import MetricsFile
from pretrain.run.bad_steps import BadSteps
from pretrain.run.state import note_failure, read_state
from pretrain.view.templates import render

pytest_plugins = ("support.prep_fixtures",)

CASES = int(os.environ.get("FUZZ_CASES", "25"))
fuzz = settings(
    max_examples=CASES,
    deadline=None,
    derandomize="FUZZ_CASES" not in os.environ,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)
ODD = (
    None, True, -1, 0, 1, 2**63, -(2**70), 1.5, 1e308, float("nan"), float("inf"), "", "x", "..",
    "/", "\ud800", "é", [], [[]], [None], {}, {"a": 1}, "0" * 5000,
)  # fmt: skip
WORLD = World(rank=0, world_size=1, local_rank=0, local_world_size=1)


def places(content: Any) -> list[tuple[Any, Any]]:
    """Every value in JSON content, as what holds it and its key there."""
    inner = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content)
        if isinstance(content, list)
        else ()
    )
    return [place for key, value in inner for place in [(content, key), *places(value)]]


@st.composite
def other_values(draw: st.DrawFn, whole: bytes) -> bytes:
    """The same JSON, written as ours is, with values of other kinds, names that are gone, or
    names that are new.
    """
    is_lines = whole.count(b"\n{") > 0
    content = [json.loads(line) for line in whole.splitlines()] if is_lines else json.loads(whole)
    for _ in range(draw(st.integers(1, 3))):
        found = places(content)
        if not found:
            break
        holder, key = draw(st.sampled_from(found))
        how = draw(st.integers(0, 9))
        if how == 0:
            del holder[key]
        elif how == 1 and isinstance(holder, dict):
            holder["new"] = 1
        else:
            # or it might come to hold itself
            holder[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
    lines = content if is_lines else [content]
    form: dict[str, Any] = {} if is_lines else {"indent": 1, "sort_keys": True}
    text = "".join(json.dumps(line, ensure_ascii=False, **form) + "\n" for line in lines)
    return text.encode(errors="surrogatepass")


@st.composite
def spoilt(draw: st.DrawFn, whole: bytes, is_json: bool) -> bytes:
    """Damage by bytes, other values, or a form that readers of JSON and YAML are known to trip
    over.
    """
    kind = draw(st.integers(0, 9))
    if kind == 0:
        odd = [
            "[" * 100_000, '{"a":' * 100_000, "[]", "{}", "null", "1", '"x"', "", "\n", "[1]\n{}\n",
            "\0" * 50,
        ]  # fmt: skip
        return draw(st.sampled_from(odd)).encode()
    return draw(other_values(whole) if is_json and kind < 6 else damaged(whole))


def ends_well(
    command: Callable[[], object], capsys: pytest.CaptureFixture[str], path: Path
) -> None:
    """It works, or ends with one line; any other exception gets out of `exit_code`."""
    capsys.readouterr()

    def main() -> None:
        command()

    code = exit_code(main)
    said = capsys.readouterr().err
    assert code in (0, 2)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == (code == 2)
    assert code == 0 or len(errors[0]) < 5000, path


def fuzz_file(
    data: st.DataObject,
    path: Path,
    command: Callable[[], object],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One case: spoil the file, run the command, bring the file back."""
    whole = path.read_bytes()
    try:
        path.write_bytes(
            data.draw(spoilt(whole, path.suffix in (".json", ".jsonl") or path.name == "latest"))
        )
        ends_well(command, capsys, path)
    finally:
        path.unlink(missing_ok=True)
        path.write_bytes(whole)


# A data set's


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """A data set to spoil, and put right again."""
    copy = tmp_path_factory.mktemp("fuzz") / "copy"
    shutil.copytree(dataset, copy)
    return copy


@pytest.fixture(scope="module")
def plan(dataset: Path) -> Plan:
    mixture = load_mixture(dataset.parent / "mixture.yaml")
    return make_plan(mixture, load_tokenizer(mixture.tokenizer_dir))


def files_of(data_dir: Path) -> dict[str, Path]:
    shard = load_manifest(data_dir).shards[0]
    return {
        "manifest": data_dir / "manifest.json",
        "build": data_dir / "build.json",
        "shard": data_dir / shard.path,
        "index": data_dir / shard.index_path,
        "tokenizer": data_dir / "tokenizer" / "tokenizer.json",
        "tokenizer config": data_dir / "tokenizer" / "tokenizer_config.json",
    }


@fuzz
@given(st.data())
@pytest.mark.parametrize(
    "kind", ["manifest", "build", "shard", "index", "tokenizer", "tokenizer config"]
)
def test_a_data_set_with_a_spoilt_file(
    built: Path, plan: Plan, kind: str, capsys: pytest.CaptureFixture[str], data: st.DataObject
) -> None:
    def commands() -> None:
        """As verify, show and a second build read it; each by itself."""
        errors = []
        for command in (
            lambda: verify.main([str(built)]),
            lambda: show.main([str(built), "--samples", "1"]),
            lambda: is_complete(built, plan),
            lambda: [*map(ShardReader(built).documents, load_manifest(built).shards)],
        ):
            try:
                command()
            except UserError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    fuzz_file(data, files_of(built)[kind], commands, capsys)


@fuzz
@given(st.data())
@pytest.mark.parametrize("kind", ["unit record", "build"])
def test_an_unfinished_build_with_a_spoilt_file(
    built: Path, dataset: Path, kind: str, capsys: pytest.CaptureFixture[str], data: st.DataObject
) -> None:
    path = built / "build.json" if kind == "build" else sorted((built / "units").rglob("*.json"))[0]
    manifest = (built / "manifest.json").read_bytes()
    build_json = (built / "build.json").read_bytes()
    (built / "manifest.json").unlink()
    try:
        fuzz_file(data, path, lambda: build(dataset.parent / "mixture.yaml", built), capsys)
    finally:
        # built again, from whatever was there: the same bits
        if (built / "manifest.json").exists():
            assert (built / "manifest.json").read_bytes() == manifest
        (built / "manifest.json").write_bytes(manifest)
        (built / "build.json").write_bytes(build_json)


# A run's


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, text_run: Path) -> Path:
    """A run to spoil, with a record of each kind."""
    copy = tmp_path_factory.mktemp("fuzz") / "run"
    shutil.copytree(text_run, copy)
    skips = [
        {"step": step, "policy": "skip", "reason": "loss nan", "loss": None} for step in (2, 4)
    ]
    (copy / "skips.jsonl").write_text("".join(json.dumps(line) + "\n" for line in skips))
    figures = {
        "step": 20,
        "loss": 1.5,
        "perplexity": 4.5,
        "bits_per_byte": 2.0,
        "targets": 99,
        "text_bytes": 99,
    }
    sure = {"documents": 6, "loss_interval": [1.0, 2.0], "bits_per_byte_interval": [1.0, 2.0]}
    how = {"stride": 8, "bootstrap": {"level": 0.95, "resamples": 9, "seed": 1}}
    told = {**figures, **sure, **how, "sources": {"sotu": {**figures, **sure}}}
    (copy / "evaluation.json").write_text(json.dumps(told))
    return copy


def run_commands(run_dir: Path, data_dir: Path) -> dict[str, tuple[Path, Callable[[], object]]]:
    """The files of a run, and what reads each."""
    newest = saved_steps(run_dir)[0]
    tracing = ["--run-dir", str(run_dir), "--data-dir", str(data_dir), "--step", "1", "--row", "0"]

    def load() -> None:
        checkpoint = load_for_reading(run_dir)
        load_model(checkpoint)
        open_data(checkpoint, data_dir)

    def state() -> None:
        read_state(run_dir)
        trace.main(tracing)
        note_failure(run_dir, "why")

    def metrics() -> None:
        MetricsFile(run_dir, 20).close()

    def skips() -> None:
        recipe = load_recipe(str(run_dir / "recipe.yaml"))
        BadSteps(run_dir, recipe.bad_steps, WORLD).restore(None)

    def figures() -> None:
        found = read_result(run_dir, 20)
        checkpoint = load_for_reading(run_dir)
        render(
            "model_card.md.jinja",
            manifest=checkpoint.manifest,
            architecture="tablefree",
            dtype="float32",
            trained_parameters=1,
            trained_tokens=1,
            figures=found.whole_split if found else None,
            one_input={},
            starts=[],
            engines=[],
            proof=None,
            gguf_name="",
            end_token="",
            stages=[],
        )

    return {
        "checkpoint manifest": (newest / "manifest.json", load),
        "sidecar": (newest / "manifest.json.xxh3_128", load),
        "tensors": (newest / "rank-00000-of-00001.safetensors", load),
        "latest": (checkpoints_dir(run_dir) / "latest", load),
        "state": (run_dir / "state.json", state),
        "metrics": (run_dir / "metrics.jsonl", metrics),
        "skips": (run_dir / "skips.jsonl", skips),
        "recipe": (run_dir / "recipe.yaml", lambda: load_recipe(str(run_dir / "recipe.yaml"))),
        "engine": (
            run_dir / "engine.json",
            lambda: load_engine_config(str(run_dir / "engine.json")),
        ),
        "evaluation": (run_dir / "evaluation.json", figures),
    }


RUN_FILES = (
    "checkpoint manifest", "sidecar", "tensors", "latest", "state", "metrics", "skips", "recipe",
    "engine", "evaluation",
)  # fmt: skip


@fuzz
@given(st.data())
@pytest.mark.parametrize("kind", RUN_FILES)
def test_a_run_with_a_spoilt_file(
    run_dir: Path,
    text_data: Path,
    kind: str,
    capsys: pytest.CaptureFixture[str],
    data: st.DataObject,
) -> None:
    if not (run_dir / "engine.json").exists():
        shutil.copyfile("ds_configs/zero2_fp32.json", run_dir / "engine.json")
    path, command = run_commands(run_dir, text_data)[kind]
    fuzz_file(data, path, command, capsys)


@fuzz
@given(st.data())
def test_a_spoilt_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], data: st.DataObject
) -> None:
    path = write_recipe(tmp_path / "recipe.yaml")
    fuzz_file(data, path, lambda: load_recipe(str(path)), capsys)


@pytest.mark.parametrize(
    "text",
    [
        "!!bool x",
        "!!timestamp x",
        "!!int x",
        "!!float x",
        "2020-13-45",
        "!!binary é",
        "? [a]\n: b",
        "&a [*a]",
        "a: *b",
        "!!python/object:os.system x",
        "[" * 3_000,
        "\0",
        "!!set {[]: }",
        "{[]: 1}",
        "!!omap [1]",
        "a: 1\na: 2",
    ],
)
def test_yaml_that_its_reader_trips_over(text: str) -> None:
    with contextlib.suppress(UserError):
        content = parse_yaml(text, "here")
        if isinstance(content, dict):
            build_recipe(content, "here")
