#!/usr/bin/env bash
# rich 15.0.0: a Live display goes back as many rows as it drew. Where the terminal has been made narrower in between and
# breaks the long ones anew (tmux, VTE, kitty, iTerm2), they have become more, and those on top stay for good, above
# every drawing that follows: each resize of a window leaves its rows behind.
#
# Seen with rich 15.0.0 under tmux 3.3a, 160 columns made 60, three rows: 5 are there where 3 were drawn.
#
# Here: pretrain/view/terminal.py draws its rows itself, and counts those that a narrower terminal has made of them;
# tests/pretrain/view/test_terminal.py::test_under_tmux_the_block_stays_whole_through_resizes holds it.
set -euo pipefail

work=$(mktemp -d)
tmux() { command tmux -f /dev/null -S "$work/socket" "$@"; }
trap 'tmux kill-server 2> /dev/null || true; rm -rf "$work"' EXIT
command -v tmux > /dev/null || { echo "tmux is needed: apt-get install tmux"; exit 1; }
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet rich==15.0.0
cat > "$work/draw.py" <<'PYTHON'
import shutil
import time

from rich.live import Live
from rich.text import Text


def rows():
    width = shutil.get_terminal_size().columns - 1
    return Text("\n".join(f"row {number} ".ljust(width, "=") for number in range(3)))


with Live(get_renderable=rows, refresh_per_second=5):
    time.sleep(30)
PYTHON
tmux new-session -d -x 160 -y 24 "seq 8; '$work/venv/bin/python' '$work/draw.py'"
sleep 4
before=$(tmux capture-pane -p | grep -c '^row')
tmux resize-window -x 60 -y 24
sleep 3
after=$(tmux capture-pane -p -S -100 | grep -c '^row')
echo "rich 15.0.0, $(tmux -V): $before rows before the terminal was made narrower, $after after"
[[ $before = 3 && $after -gt 3 ]] || exit 1
exit 0
