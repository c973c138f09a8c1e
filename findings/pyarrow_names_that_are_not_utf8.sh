#!/bin/bash
# pyarrow 26.0.1: a file whose name is not UTF-8 can't be opened by that name, and one such name beside them keeps a
# whole directory from being listed; what is raised is a UnicodeError, no ArrowException and no OSError.
#
# Such names are valid on Linux, and common in archives from elsewhere. Python's own open() takes them (PEP 383).
# Seen: ParquetFile, read_table, memory_map and get_file_info raise UnicodeEncodeError; get_file_info of the directory
# that holds it raises UnicodeDecodeError, though the other file in it is well named; through open() it reads.
# Here: data_prep/inputs/local_files.py refuses such a name when files are listed, in one line that spells it in escapes
# (tests/data_prep/inputs/test_local_files.py::test_names_that_are_not_utf8_are_refused_when_listed).
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet pyarrow==26.0.1
mkdir "$scratch/data"
cd "$scratch/data"
cat >"$scratch/look.py" <<'PYTHON'
import os
import sys

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

name = os.fsdecode(b"caf\xe9.parquet")
pq.write_table(pa.table({"text": ["a"]}), "well_named.parquet")
with open(name, "wb") as file:
    pq.write_table(pa.table({"text": ["a"]}), file)
local = pyarrow.fs.LocalFileSystem()
looks = {
    "open() and read_table": lambda: pq.read_table(open(name, "rb")).num_rows,
    "ParquetFile": lambda: pq.ParquetFile(name),
    "read_table": lambda: pq.read_table(name),
    "memory_map": lambda: pa.memory_map(name),
    "get_file_info of the file": lambda: local.get_file_info(name),
    "get_file_info of its directory": lambda: local.get_file_info(pyarrow.fs.FileSelector(".")),
}
seen = []
for what, look in looks.items():
    try:
        result = f"{look()}"
    except Exception as error:
        is_arrow = isinstance(error, (pa.ArrowException, OSError))
        result = f"{type(error).__name__}{' (ArrowException or OSError)' if is_arrow else ''}"
    seen.append(result)
    print(f"{what:32}{result}")
print("pyarrow", pa.__version__)
sys.exit(seen != ["1", *["UnicodeEncodeError"] * 4, "UnicodeDecodeError"])
PYTHON
"$scratch/venv/bin/python" "$scratch/look.py"
