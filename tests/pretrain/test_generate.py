"""The command that continues texts: what it says, of runs and exports, and what it refuses."""

import io
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import REPOSITORY, environment, run_command
from support.waiting import wait_until
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from data_prep.commands import exit_code
from data_prep.errors import UserError
from pretrain import export_hf
from pretrain.generate import main

PROMPT = "The state of the Union"
FORMS = ("tablefree", "gpt_neox")


@pytest.fixture(scope="module")
def exports(text_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in both forms."""
    home = tmp_path_factory.mktemp("exports")
    for form in FORMS:
        flags = ["--run-dir", str(text_run), "--output-dir", str(home / form)]
        export_hf.main([*flags, "--architecture", form])
    return home


def said(output: Path) -> list[dict[str, Any]]:
    """The lines that were written."""
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def continued(tmp_path: Path, *flags: str) -> list[dict[str, Any]]:
    """What the command writes."""
    main([*flags, "--output", str(tmp_path / "said.jsonl")])
    return said(tmp_path / "said.jsonl")


@pytest.mark.parametrize("form", FORMS)
def test_greedy_text_is_that_of_transformers_on_the_export(
    form: str, text_run: Path, exports: Path, tmp_path: Path
) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(exports / form)
    model: Any = AutoModelForCausalLM.from_pretrained(exports / form, trust_remote_code=True)
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False
    )
    theirs = output[0, ids.shape[1] :].tolist()
    flags = ["--prompt", PROMPT, "--max-new-tokens", "16", "--temperature", "0"]
    (of_run,) = continued(tmp_path, "--run-dir", str(text_run), *flags)
    (of_export,) = continued(tmp_path, "--model", str(exports / form), *flags)
    assert of_run["ids"] == of_export["ids"] == theirs
    assert of_run["text"] == tokenizer.decode(theirs)
    assert of_run["bits_per_byte"] == pytest.approx(of_export["bits_per_byte"], rel=1e-4)


def test_the_same_seed_gives_the_same_text_and_each_prompt_draws_its_own(
    text_run: Path, tmp_path: Path
) -> None:
    flags = ["--run-dir", str(text_run), *["--prompt", PROMPT] * 2, "--max-new-tokens", "10"]
    first, second = continued(tmp_path, *flags)
    assert continued(tmp_path, *flags) == [first, second]
    assert first["text"] != second["text"]
    assert continued(tmp_path, *flags, "--seed", "1")[0]["text"] != first["text"]


def test_a_checkpoint_can_be_named_by_step_or_directory(text_run: Path, tmp_path: Path) -> None:
    flags = ["--prompt", PROMPT, "--max-new-tokens", "5", "--temperature", "0"]
    by_step = continued(tmp_path, "--run-dir", str(text_run), "--step", "15", *flags)
    checkpoint = text_run / "checkpoints" / "step-00000015"
    assert continued(tmp_path, "--run-dir", str(checkpoint), *flags) == by_step
    newest = continued(tmp_path, "--run-dir", str(text_run), *flags)
    assert newest[0]["bits_per_byte"] != by_step[0]["bits_per_byte"]


def test_a_file_of_prompts_becomes_a_file_of_texts(
    text_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "Peace\\n"}\n{"prompt": "We must"}\n')
    flags = ["--prompts", str(tmp_path / "p.jsonl"), "--max-new-tokens", "100", "--top-k", "40"]
    lines = continued(tmp_path, "--run-dir", str(text_run), *flags)
    assert [line["prompt"] for line in lines] == ["Peace\n", "We must"]
    assert {line["ended"] for line in lines} == {"context"}  # of 32 tokens
    assert all(len(line["ids"]) <= 32 and line["bits_per_byte"] > 0 for line in lines)
    assert capsys.readouterr().out == f"{tmp_path / 'said.jsonl'}: 2 continuations\n"


def test_what_is_streamed_is_what_is_written(
    text_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--run-dir", str(text_run), "--prompt", PROMPT, "--max-new-tokens", "8"]
    (line,) = continued(tmp_path, *flags)
    capsys.readouterr()
    main(flags)
    shown = capsys.readouterr()
    assert shown.out == f"{PROMPT}{line['text']}\n"
    assert f"8 tokens, {0:.0f}"[:9] in shown.err
    assert f"{line['bits_per_byte']:.3f} bits per byte, ended: --max-new-tokens" in shown.err


def test_controls_in_a_text_are_spelled_out(
    text_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "red \x1b[31m"
    main(["--run-dir", str(text_run), "--prompt", prompt, "--max-new-tokens", "1"])
    assert capsys.readouterr().out.startswith("red \\u001b[31m")


def test_lines_of_a_pipe_are_continued(text_run: Path) -> None:
    command = [sys.executable, "-m", "pretrain.generate", "--run-dir", str(text_run)]
    result = subprocess.run(
        [*command, "--max-new-tokens", "3", "--temperature", "0"],
        input="We must\n\nPeace\n",
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.fullmatch(r"We must.+\n\nPeace.+\n", result.stdout)
    assert "> " not in result.stderr


def test_on_a_terminal_it_asks_goes_on_after_a_long_prompt_and_ends_with_ctrl_c(
    text_run: Path, tmp_path: Path
) -> None:
    main_end, side_end = pty.openpty()
    command = [sys.executable, "-m", "pretrain.generate", "--run-dir", str(text_run)]
    command += ["--temperature", "0", "--max-new-tokens", "3"]
    out, err = tmp_path / "out", tmp_path / "err"
    with out.open("wb") as out_file, err.open("wb") as err_file:
        process = subprocess.Popen(
            command, stdin=side_end, stdout=out_file, stderr=err_file, env=environment()
        )
    try:
        wait_until(lambda: "> " in err.read_text(), "a first question", job=process, log=err)
        os.write(main_end, b"word " * 40 + b"\n")
        wait_until(lambda: err.read_text().count("> ") == 2, "another", job=process, log=err)
        assert "the model sees 32 (model.seq_len)" in err.read_text()
        os.write(main_end, b"We must\n")
        wait_until(lambda: err.read_text().count("> ") == 3, "a third", job=process, log=err)
        assert out.read_text().startswith("We must")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()
        os.close(main_end)
        os.close(side_end)
    assert "Traceback" not in err.read_text()
    assert err.read_text().rstrip().endswith("stopped by Ctrl-C")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--prompt", "a"], "one of the arguments --run-dir --model is required"),
        (["--run-dir", "RUN", "--model", "RUN"], "not allowed with"),
        (["--run-dir", "RUN", "--prompt", ""], "--prompt 1: '' gives no token"),
        (["--run-dir", "RUN", "--prompt", "word " * 40], "and the model sees 32 (model.seq_len)"),
        (["--run-dir", "RUN", "--temprature", "1"], "did you mean --temperature?"),
        (["--run-dir", "RUN", "--temperature", "-1"], "-1: expected a number of 0 or more"),
        (["--run-dir", "RUN", "--temperature", "nan"], "nan: expected a number of 0 or more"),
        (["--run-dir", "RUN", "--top-p", "0"], "0: expected a number above 0, and 1 at most"),
        (["--run-dir", "RUN", "--top-k", "0"], "0: expected a whole number of 1 or more"),
        (["--run-dir", "RUN", "--seed", "-1"], "-1: expected a whole number from 0"),
        (["--run-dir", "RUN", "--max-new-tokens", "1.5"], "1.5: expected a whole number of 1 or"),
        (["--run-dir", "RUN", "--max-new-tokens", "0"], "0: expected a whole number of 1 or more"),
        (["--run-dir", "none"], "--run-dir none: no such directory; give that of a run of python"),
        (["--model", "none"], "--model none: no such directory; give one of python -m pretrain."),
        (["--model", "RUN", "--prompt", "a"], "no config.json is there"),
        (["--model", "RUN", "--step", "5"], "--step goes with --run-dir"),
        (
            ["--run-dir", "RUN", "--step", "6", "--prompt", "a"],
            "no such checkpoint; steps there: 20, 15",
        ),
        (["--run-dir", "RUN", "--prompts", "none"], "none: No such file or directory"),
        (["--run-dir", "RUN", "--prompts", "RUN"], "is a directory"),
        (["--run-dir", "RUN", "--output", "RUN"], "is a directory; give the name of a file"),
        (["--run-dir", "RUN", "--output", "texts.txt"], "give a name that ends in .jsonl"),
        (
            ["--run-dir", "RUN", "--prompt", "a", "--output", "/proc/x.jsonl"],
            "error: /proc/x.jsonl: No such file or directory; check the path",
        ),
    ],
)
def test_bad_input_is_one_line(
    flags: list[str], says: str, text_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(text_run) if flag == "RUN" else flag for flag in flags]
    assert exit_code(lambda: main(given)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert says in line


def test_an_output_that_is_the_file_of_prompts_is_refused(text_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n')
    with pytest.raises(UserError, match="is the file of prompts"):
        main(["--run-dir", str(text_run), "--prompts", str(path), "--output", str(path)])
    assert path.read_text() == '{"prompt": "a"}\n'


def test_only_what_an_earlier_call_wrote_is_replaced(text_run: Path, tmp_path: Path) -> None:
    """Not even a file of JSON lines, such as a run's own record."""
    flags = ["--prompt", "a", "--max-new-tokens", "1", "--output"]
    for content in ['{"step": 0, "loss": 1.0}\n', "my notes\n", '{"prompt": "a", "text": "b"}\n']:
        path = tmp_path / "mine.jsonl"
        path.write_text(content)
        with pytest.raises(UserError, match=r"is there, and was not written by this command"):
            main(["--run-dir", str(text_run), *flags, str(path)])
        assert path.read_text() == content
    for earlier in range(2):
        main(["--run-dir", str(text_run), *flags, str(tmp_path / "ours.jsonl")])
        assert len(said(tmp_path / "ours.jsonl")) == 1, earlier


def test_ctrl_c_keeps_what_is_whole(text_run: Path, tmp_path: Path) -> None:
    """Of many prompts, once some seconds' worth of them is there to be ended."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("We must\n" * 5000)
    log = tmp_path / "log"
    command = [sys.executable, "-m", "pretrain.generate", "--run-dir", str(text_run)]
    command += ["--prompts", str(prompts), "--output", str(tmp_path / "texts.jsonl")]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment())
    try:
        wait_until(lambda: ", on cpu" in log.read_text(), "a loaded model", job=process, log=log)
        time.sleep(1.0)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()
    lines = said(tmp_path / "texts.jsonl")
    assert 0 < len(lines) < 5000
    assert all(line["ids"] and line["ended"] for line in lines)
    assert f"{len(lines):,} continuation" in log.read_text()
    assert log.read_text().endswith("; the rest is missing\nstopped by Ctrl-C\n")


def test_a_pipe_without_a_prompt_is_refused(
    text_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n \n"))
    with pytest.raises(UserError, match="stdin: holds no prompt; write one a line"):
        main(["--run-dir", str(text_run)])


def test_another_tokenizer_in_the_run_is_refused(text_run: Path, tmp_path: Path) -> None:
    shutil.copytree(text_run, tmp_path / "run")
    (tmp_path / "run" / "tokenizer" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="is not the tokenizer of the checkpoint"):
        main(["--run-dir", str(tmp_path / "run"), "--prompt", "a"])


@pytest.mark.parametrize("form", FORMS)
def test_a_damaged_export_is_one_line_that_names_the_check(
    form: str, exports: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    whole = exports / form
    damages: dict[str, Any] = {}
    weights = load_file(whole / "model.safetensors")
    lost = next(name for name in weights if name.endswith("query_key_value.weight"))

    def lose_a_weight(path: Path) -> None:
        rest = {name: value for name, value in weights.items() if name != lost}
        save_file(rest, path / "model.safetensors", metadata={"format": "pt"})

    def cut(path: Path) -> None:
        content = (path / "model.safetensors").read_bytes()
        (path / "model.safetensors").write_bytes(content[:-1000])

    damages["1 of its parameters are not in its weights"] = lose_a_weight
    damages["does not load"] = cut
    damages["no file named model.safetensors"] = lambda path: (path / "model.safetensors").unlink()
    damages["tokenizer.json: missing"] = lambda path: (path / "tokenizer.json").unlink()
    damages["not valid JSON"] = lambda path: (path / "config.json").write_text("{")
    damages["model_type 'llama' is none of"] = lambda path: (path / "config.json").write_text(
        '{"model_type": "llama"}'
    )
    for number, (says, damage) in enumerate(damages.items()):
        path = shutil.copytree(whole, tmp_path / str(number))
        damage(path)
        with pytest.raises(UserError, match=re.escape(says)):
            main(["--model", str(path), "--prompt", "a"])


def test_a_reader_that_has_seen_enough_ends_it_quietly(text_run: Path) -> None:
    command = (
        f"{sys.executable} -m pretrain.generate --run-dir {text_run} --prompt Peace | head -c1"
    )
    result = run_command("bash", "-o", "pipefail", "-c", command)
    assert result.stdout == "P"
    assert "Traceback" not in result.stderr
    assert result.returncode == 0


def test_the_readme_s_commands_are_as_they_stand_there(
    text_run: Path, exports: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = (REPOSITORY / "pretrain" / "README.md").read_text(encoding="utf-8")
    section = readme[readme.index("## Text that a model writes") :]
    _, block, _ = section.split("```", maxsplit=2)
    commands = [shlex.split(line) for line in block.splitlines() if line]
    assert [command[:3] for command in commands] == [["python", "-m", "pretrain.generate"]] * 3
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(text_run)
    (tmp_path / "export").symlink_to(exports / "tablefree")
    (tmp_path / "prompts.txt").write_text("We must\nPeace\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Peace\n"))
    for command in commands:
        # of a run of 20 steps
        main(["15" if word == "200" else word for word in command[3:]])
    assert [line["prompt"] for line in said(tmp_path / "texts.jsonl")] == ["We must", "Peace"]
