#!/usr/bin/env bash
# Train a recipe with DeepSpeed on every GPU of this machine or, with a DeepSpeed hostfile, of many.
#
#   launch/pretrain.sh --recipe R --data-dir D --run-dir RUN_DIR [--hostfile F] [--ranks N] [pretrain.train flags ...]
#
# Prints the exact command, then runs it. On a machine without a GPU it starts 2 CPU ranks in fp32. The same
# command with the same run directory continues the run. --ranks takes fewer (or other) ranks than there are GPUs.
set -euo pipefail

# shellcheck source=launch/checks.sh
source "$(dirname "$0")/checks.sh"
parse_flags "$@"

launcher=(deepspeed --quiet)
if [ -n "$hostfile" ]; then
  [ -z "$ranks" ] || fail "--ranks and --hostfile: the hostfile's slots say how many ranks there are; leave --ranks out"
  launcher+=(--hostfile "$hostfile")
else
  # a free port, so that two runs on one machine don't meet
  read -r gpus port < <(python -c '
import socket, torch
listener = socket.create_server(("", 0))
print(torch.cuda.device_count(), listener.getsockname()[1])') ||
    fail "python can't import torch; activate the environment that holds the project"
  ranks=${ranks:-$gpus}
  if [ "$gpus" = 0 ]; then
    export DS_ACCELERATOR=cpu
    [ "$ranks" != 0 ] || ranks=2
    [[ " ${flags[*]}" =~ ' --'(deepspeed[-_]config|engine=) ]] || flags+=(--deepspeed-config zero2_fp32)
  fi
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / ranks > 0 ? $(nproc) / ranks : 1))}
  launcher+=(--num_gpus "$ranks" --master_port "$port")
fi
run "${launcher[@]}" --module pretrain.train "${flags[@]}"
