"""Continue texts with a checkpoint of a run or with an export, as they are written.

    python -m pretrain.generate --run-dir RUN_DIR [--step N] --prompt TEXT [--prompt TEXT ...]
    python -m pretrain.generate --model DIR --prompts FILE --output FILE.jsonl

Without a prompt, lines of stdin are continued, one after the other. A text depends on the model,
the prompt and its number, and the flags, --seed among them; on nothing else. It ends with the
document, after --max-new-tokens, or where the model's context does.
"""

import math
import sys
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.commands import CommandParser, exit_code, large_number
from data_prep.errors import UserError, explained, one_line, printable
from pretrain.view.figures import counted

if TYPE_CHECKING:
    from pretrain.generation.continuation import Continuation, Speaker
    from pretrain.generation.opening import Opened
    from pretrain.generation.prompts import Prompt
    from pretrain.generation.sampling import Sampling
    from pretrain.generation.texts_file import WrittenText

ABOUT = (
    "Continue texts with the newest good checkpoint of a run, or that of --step, or with an "
    "export; without a prompt, the lines of stdin. The continuations are streamed to stdout."
)
WORDS = {
    "end_of_document": "end of document",
    "max_new_tokens": "--max-new-tokens",
    "context": "the model's context is full",
}
WHOSE = {
    "--run-dir": "that of a run of python -m pretrain.train",
    "--model": "one of python -m pretrain.export_hf",
}
LARGEST_SEED = 2**63 - 1
STDIN = Path("-")


def number_in(least: float, most: float, what: str) -> Any:
    """What reads a flag's number, which is to lie between two others, both included."""

    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not least <= number <= most:
            raise ArgumentTypeError(f"{text}: expected {what}")
        return number

    return read


def seed_of(text: str) -> int:
    """A seed on a command line."""
    if not text.isdecimal() or int(text) > LARGEST_SEED:
        raise ArgumentTypeError(f"{text}: expected a whole number from 0 to 2^63 - 1")
    return int(text)


def build_parser() -> CommandParser:
    """The flags."""
    parser = CommandParser(prog="python -m pretrain.generate", description=ABOUT)
    model = parser.add_mutually_exclusive_group(required=True)
    run_help = "directory of a run of pretrain.train, or of one of its checkpoints"
    model.add_argument("--run-dir", type=Path, help=run_help)
    export_help = "an export of the form tablefree or gpt_neox"
    model.add_argument("--model", type=Path, metavar="DIR", help=export_help)
    step_help = "the checkpoint after N steps, in place of the newest"
    parser.add_argument("--step", type=int, metavar="N", help=step_help)
    prompts = parser.add_mutually_exclusive_group()
    prompt_help = "a text to continue; may be given several times"
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help=prompt_help)
    file_help = (
        'a file with a prompt a line, or JSON lines (.jsonl) with the text under "prompt"; - for '
        "lines of stdin"
    )
    prompts.add_argument("--prompts", type=Path, metavar="FILE", help=file_help)
    output_help = (
        "write JSON lines there once all is generated, an object for each prompt, and stream "
        "nothing; what an earlier call wrote there is replaced, no other file"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.jsonl", help=output_help)
    add_sampling_flags(parser)
    return parser


def add_sampling_flags(parser: CommandParser) -> None:
    """The flags that say how ids are chosen, and how many."""
    most_help = "tokens of a continuation, at most (%(default)s)"
    parser.add_argument(
        "--max-new-tokens", type=large_number, default=256, metavar="N", help=most_help
    )
    temperature_help = "0 takes the likeliest token each time (%(default)s)"
    temperature = number_in(0.0, sys.float_info.max, "a number of 0 or more")
    parser.add_argument(
        "--temperature", type=temperature, default=0.8, metavar="T", help=temperature_help
    )
    top_p_help = "draw among the fewest tokens with this probability together (all)"
    top_p = number_in(sys.float_info.min, 1.0, "a number above 0, and 1 at most")
    parser.add_argument("--top-p", type=top_p, default=1.0, metavar="P", help=top_p_help)
    top_k_help = "draw among the K likeliest tokens (all)"
    parser.add_argument("--top-k", type=large_number, metavar="K", help=top_k_help)
    seed_help = "the same seed gives the same text (%(default)s)"
    parser.add_argument("--seed", type=seed_of, default=0, metavar="N", help=seed_help)


def check_flags(flags: Namespace) -> None:
    """Raise UserError for flags that don't go together, and for places that can't be used."""
    if flags.step is not None and flags.run_dir is None:
        raise UserError("--step goes with --run-dir: an export is of one step")
    for flag, path in (("--run-dir", flags.run_dir), ("--model", flags.model)):
        if path is not None and not path.is_dir():
            raise UserError(f"{flag} {path}: no such directory; give {WHOSE[flag]}")
    output: Path | None = flags.output
    if output is None:
        return
    if flags.prompts is not None and output.resolve() == flags.prompts.resolve():
        raise UserError(f"--output {output}: is the file of prompts; give another name")
    from pretrain.generation.texts_file import check_output

    check_output(output)


def texts_of(flags: Namespace) -> list[str] | None:
    """The prompts that are known before they are continued; None where stdin is to tell them.

    Raises UserError, or OSError, for a file of prompts that can't be used.
    """
    if flags.prompt is not None:
        return list(flags.prompt)
    if flags.prompts is None or flags.prompts == STDIN:
        return None
    from pretrain.generation.prompts import read_prompts

    return read_prompts(flags.prompts)


def open_model(flags: Namespace) -> "Opened":
    """The run or export that was asked for. Raises UserError."""
    from pretrain.generation.opening import open_export, open_run

    if flags.model is not None:
        return open_export(flags.model)
    return open_run(flags.run_dir, flags.step)


def lines_of_stdin() -> Iterator[str]:
    """Lines to continue, as somebody types or pipes them; empty ones are none."""
    is_terminal = sys.stdin.isatty()
    while True:
        if is_terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        with explained(UnicodeDecodeError, "stdin: is no text in UTF-8", "convert it"):
            line = sys.stdin.readline()
        if not line:
            break
        text = line.removesuffix("\n")
        if text.strip():
            yield text
    if is_terminal:
        print(file=sys.stderr)


def prompts_of_stdin(opened: "Opened") -> Iterator["Prompt"]:
    """The prompts of stdin. One that can't be used is told to whoever types, who goes on.

    Raises UserError for one in a pipe, and for a pipe without any.
    """
    from pretrain.generation.prompts import encode_prompt

    number = 0
    for number, text in enumerate(lines_of_stdin(), start=1):
        try:
            prompt = encode_prompt(text, opened.tokenizer, opened.seq_len, f"line {number}")
        except UserError as error:
            if not sys.stdin.isatty():
                raise
            print(printable(one_line(error)), file=sys.stderr)
            continue
        yield prompt
    if number == 0 and not sys.stdin.isatty():
        raise UserError("stdin: holds no prompt; write one a line, or give --prompt or --prompts")


def stream(continuation: "Continuation") -> None:
    """Print a prompt and its continuation as it comes, and on stderr what there is to say of it."""
    began = time.monotonic()
    print(printable(continuation.prompt.text), end="", flush=True)
    try:
        for piece in continuation:
            print(printable(piece), end="", flush=True)
    finally:
        print(flush=True)  # so that what is said of a Ctrl-C stands on a line of its own
    seconds = time.monotonic() - began
    tokens = len(continuation.ids)
    bits = continuation.bits_per_byte
    parts = [
        counted(tokens, "token"),
        f"{tokens / seconds:.1f} tokens/s",
        *([] if bits is None else [f"{bits:.3f} bits per byte"]),
        f"ended: {WORDS[continuation.ended]}",
    ]
    print(", ".join(parts), file=sys.stderr, flush=True)


def written(continuation: "Continuation") -> "WrittenText":
    """What --output has of a continuation."""
    from pretrain.generation.texts_file import WrittenText

    return WrittenText(
        prompt=continuation.prompt.text,
        text=continuation.text,
        ids=continuation.ids,
        bits_per_byte=continuation.bits_per_byte,
        ended=continuation.ended,
    )


def sampling_of(flags: Namespace, number: int) -> "Sampling":
    """How the ids after a prompt are to be chosen; each of several has draws of its own."""
    from pretrain.generation.sampling import Sampling, derived_seed

    return Sampling(
        temperature=flags.temperature,
        top_k=flags.top_k,
        top_p=flags.top_p,
        seed=derived_seed(flags.seed, number),
    )


def continuations(
    flags: Namespace, speaker: "Speaker", prompts: Iterable["Prompt"]
) -> Iterator["Continuation"]:
    """How each prompt goes on, still to be generated."""
    from pretrain.generation.continuation import Continuation

    for number, prompt in enumerate(prompts):
        yield Continuation(speaker, prompt, flags.max_new_tokens, sampling_of(flags, number))


def stream_all(all_of_them: Iterable["Continuation"]) -> None:
    """Print continuations one after the other."""
    for number, continuation in enumerate(all_of_them):
        if number and not sys.stdin.isatty():
            print()  # between two texts
        stream(continuation)


def write_all(output: Path, all_of_them: Iterable["Continuation"]) -> None:
    """Write continuations into the file of --output.

    What is whole is written also where the rest fails, or Ctrl-C ends it.
    """
    from pretrain.generation.texts_file import WrittenText, write_texts

    texts: list[WrittenText] = []
    is_whole = False
    try:
        for continuation in all_of_them:
            texts.append(written(continuation.complete()))
        is_whole = True
    finally:
        if texts:
            write_texts(output, texts)
            rest = "" if is_whole else "; the rest is missing"
            print(printable(f"{output}: {counted(len(texts), 'continuation')}{rest}"), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    flags = build_parser().parse_args(arguments)
    check_flags(flags)
    texts = texts_of(flags)
    # These bring torch, which takes seconds: nobody waits for it to see --help or a mistyped flag.
    from pretrain.generation.prompts import encode_prompts

    opened = open_model(flags)
    prompts: Iterable[Prompt] = prompts_of_stdin(opened)
    if texts is not None:
        where = "--prompt" if flags.prompts is None else f"--prompts {flags.prompts}: prompt"
        prompts = encode_prompts(texts, opened.tokenizer, opened.seq_len, where)
    speaker = opened.load()
    print(printable(f"{opened.where}, on {speaker.model.device}"), file=sys.stderr)
    all_of_them = continuations(flags, speaker, prompts)
    if flags.output is None:
        stream_all(all_of_them)
    else:
        write_all(flags.output, all_of_them)


if __name__ == "__main__":
    sys.exit(exit_code(main))
