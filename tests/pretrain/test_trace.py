"""From (step, row) to documents: the ids are the loader's, and the texts are those of the input
files.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.runs import REPOSITORY, run_command, write_recipe
from tokenizers import Tokenizer

from data_prep.commands import exit_code
from data_prep.errors import UserError
from data_prep.shards import ShardReader
from pretrain import trace
from pretrain.config.load import load_recipe, recipe_to_yaml
from pretrain.data.loader import TrainingLoader
from pretrain.data.provenance import parts_of

pytest_plugins = ("support.prep_fixtures",)

SEED, ROWS, STEPS = 5, 6, 3000
PART = re.compile(
    r"(.+), row (\d+): its tokens \[(\d+):(\d+)\] of (\d+)\n"
    r"  (\S+)\[(\d+):(\d+)\]\n"
    r"  (…?)(.*?)(…?)\n?"
)


@pytest.fixture(scope="module")
def known(texts: list[str]) -> dict[tuple[str, int], str]:
    """The text at each file and row of `dataset`."""
    files = {"speeches.parquet": texts, "more/0.jsonl": texts[:5], "more/1.jsonl": texts[5:20]}
    return {(name, row): text for name, rows in files.items() for row, text in enumerate(rows)}


@pytest.fixture(scope="module")
def tokenizer(dataset: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(dataset / "tokenizer" / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return tokenizer


@pytest.fixture(scope="module")
def run_dir(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves of its recipe and data set."""
    home = tmp_path_factory.mktemp("run")
    recipe = write_recipe(home / "r.yaml", seed=SEED, train_tokens=STEPS * ROWS * 32)
    (home / "recipe.yaml").write_text(recipe_to_yaml(load_recipe(str(recipe))), encoding="utf-8")
    (home / "state.json").write_text(
        json.dumps({"fingerprint": ShardReader(dataset).manifest.fingerprint})
    )
    return home


def one_line(text: str) -> str:
    return text.replace("\r", "␍").replace("\n", "⏎")


def read_part(printed: str) -> tuple[str, bool]:
    """The text of a printed part, and whether that is the whole document."""
    match = PART.fullmatch(printed)
    assert match, printed
    return match[10], not (match[9] or match[11])


def traced(
    capsys: pytest.CaptureFixture[str], data_dir: Path, step: int, row: int, *more: str
) -> str:
    capsys.readouterr()
    trace.main(["--data-dir", str(data_dir), "--step", str(step), "--row", str(row), *more])
    return capsys.readouterr().out


@settings(max_examples=60)
@given(sample=st.integers(0, ROWS * STEPS - 1), seq_len=st.sampled_from([1, 32, 700]))
def test_every_window_is_made_of_the_documents_it_names(
    sample: int,
    seq_len: int,
    dataset: Path,
    known: dict[tuple[str, int], str],
    tokenizer: Tokenizer,
) -> None:
    reader = ShardReader(dataset)
    loader = TrainingLoader(reader, seq_len=seq_len, seed=SEED)
    parts = list(parts_of(loader, sample))
    from_shards = [np.load(dataset / p.shard.path)[p.offsets.start : p.offsets.stop] for p in parts]
    np.testing.assert_array_equal(
        np.concatenate(from_shards), loader.samples(np.array([sample]))[0]
    )
    for part, ids in zip(parts, from_shards, strict=True):
        document = [
            *tokenizer.encode(known[part.origin], add_special_tokens=False).ids,
            reader.manifest.eos_id,
        ]
        first = part.offsets.start - part.document.start
        assert len(part.document) == len(document)
        assert document[first : first + len(ids)] == ids.tolist()
        shown, whole = read_part(trace.describe_part(part, reader, tokenizer, 10**6))
        assert shown == one_line(
            tokenizer.decode(ids[: len(document) - 1 - first].tolist(), skip_special_tokens=False)
        )
        # a window may begin or end inside a character
        assert shown.strip("\ufffd") in one_line(known[part.origin])
        assert whole == (shown == one_line(known[part.origin]))


def test_the_printed_lines_lead_to_the_tokens_and_the_text(
    dataset: Path,
    run_dir: Path,
    known: dict[tuple[str, int], str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    loader = TrainingLoader(ShardReader(dataset), seq_len=32, seed=SEED)
    samples = np.linspace(0, ROWS * STEPS - 1, 80).astype(int)
    parts_seen = 0
    for sample, ids in zip(samples.tolist(), loader.samples(samples), strict=True):
        step, row = divmod(sample, ROWS)
        head, *parts = traced(
            capsys, dataset, step, row, "--run-dir", str(run_dir), "--characters", "9999"
        ).split("\n\n")
        place = loader.place(sample)
        assert f"sample     {sample}: row {row} of step {step}, which has {ROWS} rows\n" in head
        assert f"source     {place.source}, epoch {place.epoch}, ordinal " in head
        assert f"window     tokens [{place.start}:{place.start + 33}] of " in head
        found: list[int] = []
        for part in parts:
            match = PART.fullmatch(part.removesuffix("\n"))
            assert match
            shard, start, stop = match[6], int(match[7]), int(match[8])
            assert stop - start == int(match[4]) - int(match[3])
            found += np.load(dataset / shard)[start:stop].tolist()
            assert match[10].strip("\ufffd") in one_line(known[match[1], int(match[2])])
        assert found == ids.tolist()
        parts_seen += len(parts)
    assert parts_seen > len(samples)  # some windows hold more than one document


def test_each_ordinal_of_an_epoch_comes_once(dataset: Path) -> None:
    loader = TrainingLoader(ShardReader(dataset), seq_len=700, seed=SEED)
    lines = [
        trace.describe_sample(loader, sample).splitlines()[0]
        for sample in range(3 * loader.window_counts[1])
    ]
    drawn = [
        re.fullmatch(r"source     (\w+), epoch (\d+), ordinal (\d+) of (\d+)", line)
        for line in lines
    ]
    for name, windows in zip(loader.names, loader.window_counts, strict=True):
        order = [(int(m[2]), int(m[3])) for m in drawn if m and m[1] == name]
        assert order == [divmod(i, windows) for i in range(len(order))]
        assert {int(m[4]) for m in drawn if m and m[1] == name} == {windows}


def test_a_recipe_with_overrides_gives_what_the_run_gives(
    dataset: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_run = traced(capsys, dataset, 7, 2, "--run-dir", str(run_dir))
    recipe = ["--recipe", str(run_dir / "r.yaml")]
    assert traced(capsys, dataset, 7, 2, *recipe) == of_run
    assert traced(capsys, dataset, 7, 2, *recipe, "--seed=6") != of_run
    assert traced(capsys, dataset, 7, 2, *recipe, "--seed=6", f"--seed={SEED}") == of_run


def test_characters_limit_what_is_shown_of_a_document(
    dataset: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (dataset, 7, 2, "--run-dir", str(run_dir))
    few, all_ = (traced(capsys, *flags, "--characters", n).split("\n\n")[1:] for n in ("3", "9999"))
    for short, long in zip(few, all_, strict=True):
        assert read_part(short)[0] == read_part(long)[0][:3]


def test_the_readme_s_command_and_what_it_prints(
    dataset: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = (REPOSITORY / "pretrain" / "README.md").read_text(encoding="utf-8")
    example = re.search(
        r"\$ python -m pretrain\.trace --run-dir run --data-dir dataset ([^\n]*)\n(.*?)```",
        readme,
        re.DOTALL,
    )
    assert example
    capsys.readouterr()
    trace.main(["--run-dir", str(run_dir), "--data-dir", str(dataset), *example[1].split()])
    for printed in (example[2], capsys.readouterr().out):
        head, *parts = printed.strip("\n").split("\n\n")
        assert [line[:11] for line in head.splitlines()] == [
            "sample     ",
            "source     ",
            "window     ",
        ]
        assert parts
        assert all(PART.fullmatch(part) for part in parts)


def test_it_starts_without_torch(dataset: Path, run_dir: Path) -> None:
    flags = ["--run-dir", str(run_dir), "--data-dir", str(dataset), "--step", "0", "--row", "0"]
    code = (
        f"import sys; from pretrain import trace; trace.main({flags}); print('torch' in "
        "sys.modules)"
    )
    assert run_command(sys.executable, "-c", code).stdout.endswith("\nFalse\n")


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--step", str(STEPS)], f"--step {STEPS}: expected a number from 0 to {STEPS - 1}"),
        (["--step", "-1"], "--step -1: expected a number from 0"),
        (["--row", str(ROWS)], f"--row {ROWS}: expected a number from 0 to {ROWS - 1}"),
        (["--characters", "-1"], "--characters -1: expected a number from 0"),
        (["--seed=6"], "--seed=6: not a known flag; recipe keys can be set beside --recipe only"),
        (["--recipe", "quickstart"], "not allowed with argument --run-dir"),
        (
            ["--run-dir", "nowhere"],
            "--run-dir nowhere: no run is there, since recipe.yaml is missing",
        ),
        (["--data-dir", "nowhere"], "nowhere: no such directory"),
    ],
)
def test_bad_input_is_one_line(
    dataset: Path, run_dir: Path, flags: list[str], line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    good = ["--run-dir", str(run_dir), "--data-dir", str(dataset), "--step", "0", "--row", "0"]
    assert exit_code(lambda: trace.main([*good, *flags])) == 2
    err = capfd.readouterr().err
    assert line in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("name", ["recipe.yaml", "state.json"])
@pytest.mark.parametrize("content", ["{", "[]", "{}", "model: 1"])
def test_a_damaged_run_is_one_line(
    dataset: Path, run_dir: Path, tmp_path: Path, name: str, content: str
) -> None:
    for file in ("recipe.yaml", "state.json"):
        (tmp_path / file).write_bytes((run_dir / file).read_bytes())
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(str(tmp_path / name))):
        trace.main(
            ["--run-dir", str(tmp_path), "--data-dir", str(dataset), "--step", "0", "--row", "0"]
        )


def test_another_data_set_is_refused(run_dir: Path, text_data: Path) -> None:
    with pytest.raises(UserError, match=r"--data-dir: fingerprint \w+, but .* was trained on \w+"):
        trace.main(
            ["--run-dir", str(run_dir), "--data-dir", str(text_data), "--step", "0", "--row", "0"]
        )


def test_a_shard_that_is_not_as_it_was_built_is_said_beside_what_it_holds(
    dataset: Path, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(dataset, tmp_path / "data")
    for shard in ShardReader(data).manifest.shards:
        content = (data / shard.path).read_bytes()
        (data / shard.path).write_bytes(content[:-64] + bytes(64))
    trace.main(["--run-dir", str(run_dir), "--data-dir", str(data), "--step", "6", "--row", "2"])
    printed = capsys.readouterr()
    assert printed.out.startswith("sample ")
    lines = printed.err.splitlines()
    assert len(lines) == len(set(lines)) >= 1
    assert all(line.startswith(f"warning: {data}/shards/train/") for line in lines)
    assert all(": differs from its digest: " in line for line in lines)


def test_a_real_run_s_first_step(
    text_run: Path, text_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = traced(capsys, text_data, 0, 0, "--run-dir", str(text_run))
    assert out.startswith(
        "sample     0: row 0 of step 0, which has 6 rows\nsource     sotu, epoch 0, ordinal 0 of "
    )
    with pytest.raises(UserError, match="--step 20: expected a number from 0 to 19"):
        trace.main(
            ["--run-dir", str(text_run), "--data-dir", str(text_data), "--step", "20", "--row", "0"]
        )
