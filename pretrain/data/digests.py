"""Whether files of a data set are still as they were built. Without torch, which takes seconds
to import.
"""

from collections.abc import Iterable
from pathlib import Path

from data_prep.errors import UserError, os_error_line
from data_prep.files import digest_file
from data_prep.manifest import Shard
from data_prep.shards import ShardReader
from pretrain.checkpoint.patience import patiently


def digests_of(shards: Iterable[Shard]) -> dict[str, str]:
    """Files of shards, ids and document indexes, relative to the data set, and their xxh3-128
    digests.
    """
    return {path: digest for shard in shards for path, digest in shard.digests.items()}


def check_file(data_dir: Path, path: str, digest: str, advice: str) -> None:
    """Raise UserError unless a file of a data set has its digest."""
    if (got := patiently(lambda: digest_file(data_dir / path))) != digest:
        raise UserError(
            f"{data_dir / path}: differs from its digest: {got}, expected {digest}; {advice}"
        )


def repair_advice(data_dir: Path) -> str:
    """What to do about a bad file of a data set."""
    return f"python -m data_prep.verify {data_dir} --repair builds it again"


def check_shards(reader: ShardReader, shards: Iterable[Shard]) -> None:
    """Raise UserError for the first file of some shards that differs from its digest."""
    for path, digest in digests_of(shards).items():
        check_file(reader.data_dir, path, digest, repair_advice(reader.data_dir))


def lengths_that_differ(data_dir: Path) -> list[str]:
    """What is wrong with the files of a data set, as far as their lengths tell: a line, or none."""
    try:
        ShardReader(data_dir).check_files()
    except (UserError, OSError) as error:
        return [os_error_line(error)]
    return []
