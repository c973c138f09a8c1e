"""Made the files below `tokenised/`: the same documents as other projects' own writers store them.

    python tests/data/make_tokenised.py datatrove DIR   # datatrove 0.10.1, tokenizers 0.23.1
    python tests/data/make_tokenised.py olmo DIR        # dolma 1.2.1, tokenizers 0.21.4, numpy 1.26

Each in an environment of its own, with DIR/tokenizer made by

    python -m data_prep.train_tokenizer --vocab-size 300 --source DIR/documents.jsonl \\
        --output-dir DIR/tokenizer

The texts were written for this purpose: `documents.jsonl` is what `documents()` gives. dolma pins
tokenizers below 0.20, which can't load a tokenizer.json whose merges are pairs; 0.21 was put in its
place.
"""

import gzip
import json
import sys
from pathlib import Path

EOS = "<|endoftext|>"
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def documents() -> list[dict[str, str]]:
    """Forty short texts; some spell the end-of-document token, one has characters of several
    bytes.
    """
    texts = [
        f"Text {word} of the {place} row.\nIt has two lines."
        for place in ("upper", "lower")
        for word in NUMBERS
    ]
    texts += [f"A text may say {EOS} in its middle, {word} times." for word in NUMBERS]
    texts += [f"{word}: naïve 日本語 🙂" for word in NUMBERS]
    return [{"id": str(i), "text": text, "source": "own"} for i, text in enumerate(texts)]


def write_datatrove(directory: Path) -> None:
    """With an end-of-document token and without one; ids of 2 and of 4 bytes are chosen by the
    vocabulary's size.
    """
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    for name, eos in (("datatrove_eos", EOS), ("datatrove", None)):
        steps = [
            JsonlReader(str(directory), glob_pattern="documents.jsonl"),
            DocumentTokenizer(
                str(directory / name),
                tokenizer_name_or_path=str(directory / "tokenizer" / "tokenizer.json"),
                eos_token=eos,
                shuffle_documents=False,
                save_filename="own",
            ),
        ]
        LocalPipelineExecutor(pipeline=steps, logging_dir=str(directory / f"{name}_logs")).run()


def write_olmo(directory: Path) -> None:
    """dolma reads compressed files alone, shuffles documents, and takes 2 bytes an id for so
    small a vocabulary.
    """
    from dolma.tokenizer import tokenize_in_parallel

    packed = directory / "documents.jsonl.gz"
    packed.write_bytes(gzip.compress((directory / "documents.jsonl").read_bytes()))
    tokenize_in_parallel(
        sources=[str(packed)],
        destination=str(directory / "olmo"),
        dtype="uint16",
        eos_token_id=0,
        tokenizer_name_or_path=str(directory / "tokenizer" / "tokenizer.json"),
        pad_token_id=0,
        debug=True,
    )
    packed.unlink()


if __name__ == "__main__":
    kind, directory = sys.argv[1], Path(sys.argv[2])
    lines = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents())
    (directory / "documents.jsonl").write_text(lines, encoding="utf-8")
    {"datatrove": write_datatrove, "olmo": write_olmo}[kind](directory)
