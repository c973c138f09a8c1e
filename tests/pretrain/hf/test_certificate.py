"""The certificate of an export: what it proves, what it refuses, and what `--check` finds by it."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.untrained_runs import save_untrained_run

from data_prep.errors import UserError
from data_prep.files import digest_file
from pretrain.checkpoint.find import load_for_reading
from pretrain.export_hf import main
from pretrain.hf.certificate import BOUNDS, CERTIFICATE_NAME, REPEATED, read_certificate
from pretrain.hf.check import check_export
from pretrain.hf.export import exported_tokenizer, open_asked, subject_of
from pretrain.hf.marker import MARKER_NAME
from pretrain.hf.names import CARD_NAME, MODELING_FILE, WEIGHTS_FILE
from pretrain.hf.proof.process import REFUSED
from pretrain.hf.proof.prove import prove, repeat
from pretrain.modeling_tablefree import TableFreeConfig

FORMS = ("tablefree", "gpt_neox")
LARGEST_FILE = 300_000  # bytes of a certificate
# An output's, a query's or key's, which moves logits by less than kernels differ by, the table's.
TRIED = ("embed_out.weight", "lm_head.weight", "layers.1.attention.query_key_value.weight",
         "embed_in.weight")  # fmt: skip


@pytest.fixture(scope="module")
def exports(text_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The trained run in both forms and precisions, and a run of a learned table without data."""
    home = tmp_path_factory.mktemp("exports")
    source = ["--run-dir", str(text_run)]
    for form in FORMS:
        for dtype in BOUNDS:
            flags = ["--architecture", form, "--dtype", dtype]
            main([*source, "--output-dir", str(home / f"{form} {dtype}"), *flags])
    save_untrained_run(home / "run", text_run / "tokenizer", "learned")
    flags = ["--architecture", "gpt_neox", "--output-dir", str(home / "learned")]
    main(["--run-dir", str(home / "run"), *flags])
    return {path.name: path for path in home.iterdir() if path.name != "run"}


@pytest.fixture
def copy(exports: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of an export, to be damaged."""

    def make(name: str) -> Path:
        return Path(shutil.copytree(exports[name], tmp_path / "copy"))

    return make


def change_marker(directory: Path, digests: dict[str, str | None]) -> None:
    """Other digests of some files, as if they had been exported so; None: not exported at all."""
    path = directory / MARKER_NAME
    content = json.loads(path.read_bytes())
    files = {**content["files"], **digests}
    content["files"] = {name: digest for name, digest in files.items() if digest is not None}
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def make_digests_anew(directory: Path) -> None:
    """As somebody would who wants a changed file to pass, or whose tools did."""
    path = directory / CERTIFICATE_NAME
    content = json.loads(path.read_bytes())
    content["files"] = {name: digest_file(directory / name) for name in content["files"]}
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    names = json.loads((directory / MARKER_NAME).read_bytes())["files"]
    change_marker(directory, {name: digest_file(directory / name) for name in names})


def stage(text_run: Path, export: Path, home: Path, form: str = "tablefree") -> Callable[[], Any]:
    """What proves a copy of an export, which may be changed before, against its run."""
    staged = home / "new"
    shutil.copytree(export, staged)
    asked = open_asked(text_run, None, form, "float32")
    config = TableFreeConfig.from_dict(asked.checkpoint.manifest.model_config)
    subject = subject_of(asked, exported_tokenizer(asked, config))
    return lambda: prove(staged, subject, home / "export")


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("form", FORMS)
def test_a_certificate_tells_what_was_compared_and_what_came_out(
    form: str, dtype: str, exports: dict[str, Path], text_run: Path
) -> None:
    directory = exports[f"{form} {dtype}"]
    certificate = read_certificate(directory)
    assert certificate
    checkpoint = load_for_reading(text_run)
    identity = (checkpoint.manifest.fingerprint, checkpoint.step, form, dtype)
    assert certificate.identity == identity
    others = {path.name for path in directory.iterdir()} - {CERTIFICATE_NAME, MARKER_NAME}
    assert certificate.files == {name: digest_file(directory / name) for name in others}
    windows = certificate.windows
    assert (windows.kind, windows.number, windows.positions) == ("validation", 64, 32)
    assert windows.of > 64
    logits = certificate.logits
    assert 0.5 < logits.spread < 5
    assert 4 < logits.loss_as_exported < 7
    if dtype == "float32":
        assert logits.relative < 1e-5
        assert logits.same_first_choice > 0.999
    else:
        assert 1e-4 < logits.relative < BOUNDS[dtype].logits
    assert certificate.generation.prompts == 2
    assert certificate.generation.new_tokens == 16
    assert certificate.generation.other_texts == 0
    assert certificate.tokenizer.same_ids == certificate.tokenizer.texts >= 64
    # Some windows begin within a word.
    assert certificate.tokenizer.came_back > certificate.tokenizer.texts / 2
    assert {"torch", "transformers", "tokenizers", "safetensors"} < certificate.versions.keys()
    content = (directory / CERTIFICATE_NAME).read_text()
    assert len(content) < LARGEST_FILE
    assert str(text_run) not in content
    assert checkpoint.manifest.data_dir not in content


@pytest.mark.parametrize("form", FORMS)
def test_the_card_has_it_in_short(form: str, exports: dict[str, Path]) -> None:
    card = (exports[f"{form} float32"] / CARD_NAME).read_text(encoding="utf-8")
    section = card.partition("## Certificate\n")[2].partition("\n## ")[0]
    assert "on 64 windows of 32 tokens of the validation split:" in section
    assert "with a cache, without, left-padded | the same |" in section
    assert re.search(r"\| largest difference of a logit \| \S+ of their spread \|", section)


def test_without_the_data_set_ids_are_drawn_which_it_says(exports: dict[str, Path]) -> None:
    certificate = read_certificate(exports["learned"])
    assert certificate
    assert certificate.windows.kind == "drawn"
    assert certificate.windows.why
    assert certificate.windows.why.startswith("the data set is not at hand (")
    assert "/" not in certificate.windows.why
    card = (exports["learned"] / CARD_NAME).read_text(encoding="utf-8")
    assert "tokens drawn from the vocabulary (the data set is not at hand" in card


@pytest.mark.parametrize("name", REFUSED)
def test_the_clean_process_can_t_import_this_project(
    name: str,
    exports: dict[str, Path],
    text_run: Path,
    tmp_path: Path,
) -> None:
    proves = stage(text_run, exports["tablefree float32"], tmp_path)
    code = tmp_path / "new" / MODELING_FILE.name
    code.write_text(f"import {name}\n{code.read_text()}")
    # Here it can, also from elsewhere.
    subprocess.run([sys.executable, "-c", f"import {name}"], cwd="/", check=True)
    with pytest.raises(UserError, match=rf"can't be loaded .*{name}"):
        proves()


def test_weights_other_than_the_run_s_are_refused(
    exports: dict[str, Path], text_run: Path, tmp_path: Path
) -> None:
    proves = stage(text_run, exports["tablefree float32"], tmp_path)
    assert proves().logits.relative < 1e-5
    path = tmp_path / "new" / WEIGHTS_FILE
    weights = load_file(path)
    weights["model.final_norm.bias"][3] += 0.5
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"not exported, .*: logits differ .* \(at most 0\.0002\)"):
        proves()


def test_other_text_with_a_cache_than_without_is_refused(
    exports: dict[str, Path], text_run: Path, tmp_path: Path
) -> None:
    proves = stage(text_run, exports["tablefree float32"], tmp_path)
    code = tmp_path / "new" / MODELING_FILE.name
    text = code.read_text()
    positions = "        positions_BT = position_ids\n"
    assert positions in text
    # Right for a prompt; each token after it, which comes alone, takes the first position.
    alone = (
        "        if past is not None and position_ids is not None and position_ids.shape[1] == 1:\n"
    )
    first = "            positions_BT = position_ids * 0\n"
    code.write_text(text.replace(positions, f"{positions}{alone}{first}"))
    with pytest.raises(UserError, match="greedy text with a cache is another: its logits"):
        proves()


def test_a_tokenizer_other_than_the_data_s_is_refused(
    exports: dict[str, Path], text_run: Path, tmp_path: Path
) -> None:
    proves = stage(text_run, exports["gpt_neox float32"], tmp_path, "gpt_neox")
    path = tmp_path / "new" / "tokenizer.json"
    content = json.loads(path.read_bytes())
    content["model"]["merges"] = content["model"]["merges"][:20]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="the tokenizer gives other ids for"):
        proves()


def test_what_a_precision_does_not_bear_is_refused_and_nothing_is_put_in_place(
    text_run: Path, tmp_path: Path
) -> None:
    # Attention so sharp that rounding its scores chooses another token.
    save_untrained_run(tmp_path / "run", text_run / "tokenizer", "binary_code", noise=3.0)
    flags = ["--run-dir", str(tmp_path / "run"), "--output-dir", str(tmp_path / "e")]
    with pytest.raises(UserError) as raised:
        main([*flags, "--dtype", "bfloat16"])
    said = str(raised.value)
    assert "\n" not in said
    assert "logits differ from the training class's by up to" in said
    assert said.endswith("these weights don't bear that precision: export float32, or report it")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    main(flags)
    assert read_certificate(tmp_path / "e")


def flip_sign(directory: Path, name: str) -> None:
    """Turn the sign of one weight: of median size, so that most others would move more."""
    path = directory / WEIGHTS_FILE
    weights = load_file(path)
    values = weights[name].flatten()
    place = int(values.float().abs().argsort()[len(values) // 2])
    values[place] = -values[place] if values[place] else 1.0  # of codes, half are zeros
    weights[name] = values.view(weights[name].shape)
    save_file(weights, path, {"format": "pt"})


@pytest.mark.parametrize("name", ["tablefree float32", "gpt_neox bfloat16", "learned"])
def test_one_flipped_weight_is_found_also_where_digests_were_made_anew(
    name: str, copy: Callable[[str], Path]
) -> None:
    directory = copy(name)
    certificate = read_certificate(directory)
    assert certificate
    assert not repeat(directory, certificate).problems
    weights = (directory / WEIGHTS_FILE).read_bytes()
    names = [each for each in load_file(directory / WEIGHTS_FILE) if each.endswith(TRIED)]
    assert len(names) >= 2
    for parameter in names:
        flip_sign(directory, parameter)
        (problem,) = repeat(directory, certificate).problems
        assert (
            f"its weights, or its config.json, are not those that were exported ({parameter}; "
            in problem
        )
        (directory / WEIGHTS_FILE).write_bytes(weights)
    flip_sign(directory, names[0])
    make_digests_anew(directory)
    (problem,) = check_export(directory).problems
    assert f"({names[0]}; " in problem
    # By what they compute alone: an output's weight moves logits, if few.
    flip_sign(directory, names[0])
    head = next(each for each in names if each in ("embed_out.weight", "lm_head.weight"))
    flip_sign(directory, head)
    without_sums = replace(certificate.sketch, weights={})
    (problem,) = repeat(directory, replace(certificate, sketch=without_sums)).problems
    found = re.search(r"\(they don't compute what they did; (\S+) of the logits' spread", problem)
    assert found
    assert REPEATED < float(found[1]) < 1


def test_a_file_that_only_the_certificate_knows_otherwise_is_told(
    copy: Callable[[str], Path],
) -> None:
    directory = copy("gpt_neox float32")
    flip_sign(directory, "embed_out.weight")
    change_marker(directory, {WEIGHTS_FILE: digest_file(directory / WEIGHTS_FILE)})
    says = f"{directory / WEIGHTS_FILE}: differs from its digest in {CERTIFICATE_NAME}; export"
    (problem,) = check_export(directory).problems
    assert problem.startswith(says)


def test_a_check_runs_nothing_of_the_export(copy: Callable[[str], Path], tmp_path: Path) -> None:
    directory = copy("tablefree float32")
    evil = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    code = directory / MODELING_FILE.name
    code.write_text(evil + code.read_text())
    (directory / "evil.py").write_text(evil + code.read_text())
    config = json.loads((directory / "config.json").read_bytes())
    config["auto_map"] = {auto: f"evil.{own.split('.')[1]}" for auto, own in
                          config["auto_map"].items()}  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    make_digests_anew(directory)
    verdict = check_export(directory)
    assert not verdict.problems
    assert verdict.certificate
    assert not (tmp_path / "ran").exists()


def test_an_export_of_before_there_were_certificates_is_right(copy: Callable[[str], Path]) -> None:
    directory = copy("gpt_neox float32")
    (directory / CERTIFICATE_NAME).unlink()
    change_marker(directory, {CERTIFICATE_NAME: None})
    verdict = check_export(directory)
    assert not verdict.problems
    assert verdict.certificate is None
    (note,) = verdict.notes
    assert note.startswith(f"there is no {CERTIFICATE_NAME} (early versions made none)")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"sketch": {}}', "[" * 100_000, "null"], ids=range(6)
)
def test_a_damaged_certificate_is_told(content: str, copy: Callable[[str], Path]) -> None:
    directory = copy("gpt_neox float32")
    (directory / CERTIFICATE_NAME).write_text(content)
    change_marker(directory, {CERTIFICATE_NAME: digest_file(directory / CERTIFICATE_NAME)})
    (problem,) = check_export(directory).problems
    assert problem.startswith(str(directory / CERTIFICATE_NAME))
    assert "\n" not in problem
