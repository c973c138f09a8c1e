"""Processes of this machine that belong to something on disk."""

import re
import shlex
from pathlib import Path

import psutil


def processes_of(run_dir: Path, pattern: str = "") -> list[psutil.Process]:
    """All with the run's directory on their command line."""
    lines = [
        (process, shlex.join(process.info["cmdline"] or []))
        for process in psutil.process_iter(["cmdline"])
    ]
    return [process for process, line in lines if str(run_dir) in line and re.search(pattern, line)]
