"""What tests and benchmarks share: data sets, runs, ranks, nodes, servers and files, one of each.

Folders of tests are named after the packages that they test. Where Python finds only such a folder,
as it does when a file of tests is run by its path, it takes that for the package: so the repository
itself is put in front.
"""

import sys
from pathlib import Path

if (repository := str(Path(__file__).parents[2])) not in sys.path:
    sys.path.insert(0, repository)
