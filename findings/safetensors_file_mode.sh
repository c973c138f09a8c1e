#!/usr/bin/env bash
# safetensors 0.8.0: save_file makes a file that nobody but its owner can read, whatever the umask. Up to 0.7.0 the umask
# decided, as for every file that a program makes. So a model saved for a group, or by one user for a service of another,
# can't be loaded there, while everything beside it can be read.
#
# Seen:
#   safetensors 0.7.0, umask 022: config.json 644, model.safetensors 644
#   safetensors 0.8.0, umask 022: config.json 644, model.safetensors 600
#
# Here: pretrain/hf/export.py gives model.safetensors the mode of the files beside it
# (tests/pretrain/test_export_hf.py::test_all_files_have_the_mode_that_the_umask_gives).
set -euo pipefail

home=$(mktemp -d)
trap 'rm -rf "$home"' EXIT
cd "$home"
umask 022
python3 -m venv venv

check() { # VERSION EXPECTED_MODE
  venv/bin/python -m pip install --quiet "safetensors==$1" "numpy==2.4.6"
  rm -f config.json model.safetensors
  venv/bin/python -c "
import numpy, safetensors.numpy
safetensors.numpy.save_file({'weight': numpy.zeros(3)}, 'model.safetensors')
open('config.json', 'w').write('{}')"
  echo "safetensors $1, umask 022: config.json $(stat -c %a config.json), model.safetensors $(stat -c %a model.safetensors)"
  [ "$(stat -c %a config.json) $(stat -c %a model.safetensors)" = "644 $2" ] || { echo "that has changed" && exit 1; }
}

check 0.7.0 644
check 0.8.0 600
