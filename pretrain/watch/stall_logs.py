"""What ranks that stalled leave in the run's directory: their stacks, each below a line that says
when. Only this module knows that line.

    logs/rank-00000.log
"""

import re
import time
from pathlib import Path

from pretrain.checkpoint.layout import LOGS_NAME

# Earlier versions wrote it with a blank between date and time, in the time of their place.
HEADER = re.compile(r"^(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d:\d\d)Z? .* stalled$", re.MULTILINE)


def log_path(run_dir: Path, rank: int) -> Path:
    """Where a rank's stacks go."""
    return run_dir / LOGS_NAME / f"rank-{rank:05d}.log"


def header(name: str) -> str:
    """The line above the stacks of a rank that stalls now."""
    return f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {name} stalled"


def stalls_of_run(run_dir: Path) -> tuple[str, ...]:
    """When a run stalled, as starts.jsonl tells times; all ranks tell of a stall within seconds,
    so the lowest that has a log is asked.
    """
    for path in sorted((run_dir / LOGS_NAME).glob("rank-*.log")):
        text = path.read_text(encoding="utf-8", errors="replace")
        return tuple(f"{date}T{clock}Z" for date, clock in HEADER.findall(text))
    return ()
