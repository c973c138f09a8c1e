"""A tokenizer as data preparation uses it: a text has the ids that it would have in the shards.

No torch: a run's prompts are looked at before that is imported.
"""

from pathlib import Path

from tokenizers import Tokenizer

from data_prep.errors import UserError, explained
from data_prep.shards import read_tokenizer, sha256_of_files

DEFINITION_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
COPY_IT = "copy the tokenizer of the run's data set there"


def refuse_another_tokenizer(source: Path, expected: str | None) -> None:
    """Raise UserError where a run's tokenizer is not the one whose identity its checkpoint tells.

    A checkpoint that tells none is content with any. What is missing is left to `as_exported`,
    which names it.
    """
    files = read_tokenizer(source)
    if not expected or not {DEFINITION_NAME, CONFIG_NAME} <= files.keys():
        return
    found = sha256_of_files(files)
    if found != expected:
        raise UserError(
            f"{source}: is not the tokenizer of the checkpoint (sha256 {found[:12]}, not "
            f"{expected[:12]}): its files were changed; {COPY_IT}"
        )


def as_in_the_data(definition: bytes, where: Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json` as data preparation uses it.

    Raises UserError if it is none.
    """
    # The library raises nothing more exact.
    with explained(Exception, f"{where}: not a loadable tokenizer", COPY_IT):
        tokenizer = Tokenizer.from_buffer(definition)
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None) is not None:
        tokenizer.model.dropout = None
    return tokenizer


def open_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer in a directory of a data set, a run or an export, as in the data.

    Raises UserError where there is none, or none that loads.
    """
    path = directory / DEFINITION_NAME
    if not path.is_file():
        raise UserError(f"{path}: missing; {COPY_IT}")
    # Also through a link, as the hub's cache has them; of data sets and runs those are refused
    # before.
    return as_in_the_data(path.read_bytes(), path)
