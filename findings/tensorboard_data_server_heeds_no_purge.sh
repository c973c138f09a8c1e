#!/usr/bin/env bash
# TensorBoard takes back the points of a run that was resumed, from the step of the record SessionLog.START on, as
# SummaryWriter(purge_step=...) writes it; but not in the server of data that it starts by itself, which drops a point only
# where a later one of the same name has no higher step. So a validation behind the checkpoint that a run went on from
# stays drawn until the next one comes, for ever if none does. Seen with tensorboard 2.21.0, tensorboard-data-server 0.7.2:
#
#   tensorboard 2.21.0, data server 0.7.2: steps drawn by the server: [9, 19, 24], with --load_fast=false: [9, 19]
#
# Here: pretrain/metrics/tensorboard_sink.py, take_back, cuts the files as well
# (tests/pretrain/metrics/test_tensorboard_sink.py::test_what_is_taken_back_is_in_no_file_any_more).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q tensorboard==2.21.0 tensorboard-data-server==0.7.2
cd "$work"
PATH="$work/venv/bin:$PATH" "$work/venv/bin/python" - <<'END'
import json
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.metadata import version
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


def write(name, records):
    writer = RecordWriter(open(f"logs/run/events.out.tfevents.{name}", "wb"))
    for record in [Event(file_version="brain.Event:2"), *records]:
        writer.write(record.SerializeToString())
    writer.close()


def start(step):
    return Event(step=step, session_log=SessionLog(status=SessionLog.START))


def point(step, tag="val"):
    return Event(step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=1.0)]))


def drawn(*flags):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["tensorboard", "--logdir", "logs", "--port", str(port), *flags]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}/data/plugin/scalars/scalars?run=run&tag=val"
    try:
        for _ in range(120):
            try:
                return [step for _, step, _ in json.load(urllib.request.urlopen(url, timeout=5))]
            except OSError:
                time.sleep(0.5)
    finally:
        server.terminate()
        server.wait()


Path("logs/run").mkdir(parents=True)
write("1000000000.a", [start(0), point(9), point(19), point(24)])
write("1000000001.a", [start(20), point(20, "loss")])
fast, slow = drawn(), drawn("--load_fast=false")
versions = f"tensorboard {version('tensorboard')}, data server {version('tensorboard-data-server')}"
print(f"{versions}: steps drawn by the server: {fast}, with --load_fast=false: {slow}")
sys.exit(0 if (fast, slow) == ([9, 19, 24], [9, 19]) else 1)
END
