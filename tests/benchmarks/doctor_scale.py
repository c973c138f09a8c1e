"""How long the doctor's quick part takes for many hosts, all played by this machine.

    python tests/benchmarks/doctor_scale.py --hosts 64

pdsh runs a stand-in for ssh, which types the command into a shell here. Every host's probe runs for
real, at the same time, on the cores of one machine: real hosts have cores of their own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# What pdsh gives to ssh: options that begin with a dash or belong to one, the host, the command.
STAND_IN = """#!/usr/bin/env python3
import os, sys
os.execvp("sh", ["sh", "-c", sys.argv[-1]])
"""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--hosts", type=int, default=64)
    hosts = parser.parse_args().hosts
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        ssh = home / "ssh"
        ssh.write_text(STAND_IN)
        ssh.chmod(0o755)
        (home / "hosts").write_text("".join(f"10.9.0.{n} slots=8\n" for n in range(1, hosts + 1)))
        typed = [sys.executable, "-m", "launch.doctor", "--hostfile", home / "hosts"]
        start = time.monotonic()
        result = subprocess.run(
            [*typed, "--run-dir", home, "--quick", "--json"],
            env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"},
            stdout=subprocess.PIPE,
            check=False,  # it may find faults of this machine
        )
        seconds = time.monotonic() - start
    rows = json.loads(result.stdout)
    answered = [row["found"] for row in rows if row["check"] == "reachable"]
    print(f"answered: {'; '.join(answered)}; {seconds:.1f} s on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
