#!/usr/bin/env bash
# pyarrow's Array.to_numpy() and pa.scalar() import pandas, where it is installed, though no pandas object takes part.
# Seen with pyarrow 26.0.1 and pandas 3.0.0. With pandas 3.1.1 it took 0.25 to 0.65 s of CPU, on a loaded machine,
# in a process that needs nothing else of it.
# Here: data_prep/formats/flat_arrays.py reads the buffers;
# tests/data_prep/formats/test_flat_arrays.py holds a build free of pandas.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q pyarrow==26.0.1 pandas==3.0.0 numpy
"$work/venv/bin/python" - <<'END'
import sys

import numpy as np
import pyarrow as pa

buffers = [None, pa.py_buffer(np.arange(3))]
numbers = pa.Int64Array.from_buffers(pa.int64(), 3, buffers)
before = "pandas" in sys.modules
numbers.to_numpy()
after = "pandas" in sys.modules
print(f"pyarrow {pa.__version__}: pandas is imported before to_numpy(): {before}, after it: {after}")
sys.exit(0 if (before, after) == (False, True) else 1)
END
