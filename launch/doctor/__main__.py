"""Says whether a run can start on these machines: asks all of them at once, a verdict a row.

Exit code 0: it can; 1: something must be mended first; 2: bad input.
"""

import json
import sys
from pathlib import Path

from data_prep.commands import CommandParser, exit_code
from data_prep.errors import UserError, printable
from launch.doctor.ask import ask, ask_ports
from launch.doctor.verdicts import State, Verdict, judge, ports
from launch.hosts import HERE, read_hostfile


def table(verdicts: list[Verdict]) -> str:
    """A line for each verdict, in columns."""
    width = max(len(v.check) for v in verdicts)
    names = max(len(v.host) for v in verdicts)
    lines = []
    for v in verdicts:
        remedy = f"; {v.remedy}" if v.remedy else ""
        line = f"{v.state:<7}  {v.check:<{width}}  {v.host:<{names}}  {v.found}{remedy}"
        lines.append(printable(line))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """The command. Raises UserError."""
    about = (__doc__ or "").split("\n")[0]
    parser = CommandParser(prog="python -m launch.doctor", description=about)
    parser.add_argument("--hostfile", type=Path, metavar="F", help="default: this machine alone")
    parser.add_argument("--data-dir", default="", metavar="D", help="the same on all of them?")
    parser.add_argument("--run-dir", type=Path, metavar="RUN", help="shared, with room and locks?")
    parser.add_argument("--quick", action="store_true", help="neither measure disks nor try ports")
    parser.add_argument("--json", action="store_true", help="a list of verdicts, for scripts")
    flags = parser.parse_args(argv)
    if flags.data_dir and not (Path(flags.data_dir) / "manifest.json").is_file():
        raise UserError(f"--data-dir {flags.data_dir}: no manifest.json there; name a data set")
    hosts = list(read_hostfile(flags.hostfile)) if flags.hostfile else [HERE]
    asked = ask(hosts, flags.data_dir, flags.run_dir, not flags.quick)
    verdicts = judge(asked)
    if len(asked.facts) > 1 and not flags.quick:
        verdicts += ports(ask_ports(list(asked.facts)))
    if flags.json:
        print(json.dumps([verdict._asdict() for verdict in verdicts], indent=1))
    else:
        print(table(verdicts))
    if any(verdict.state is State.MEND for verdict in verdicts):
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(exit_code(main))
