#!/usr/bin/env bash
# Train a recipe with DeepSpeed on every GPU of this machine or, with a DeepSpeed hostfile, of many.
#
#   launch/pretrain.sh --recipe R --data-dir D --run-dir RUN_DIR [--hostfile F] [--ranks N] [pretrain.train flags ...]
#
# Prints the exact command, then runs it. On a machine without a GPU it starts 2 CPU ranks in fp32. The same
# command with the same run directory continues the run. --ranks takes fewer (or other) ranks than there are GPUs.
# SIGTERM, SIGINT (Ctrl-C) or SIGUSR1 end it after the step, saved; a second one, more than 2 s later, at once.
set -euo pipefail

# shellcheck source=launch/checks.sh
source "$(dirname "$0")/checks.sh"
parse_flags "$@"

# a free port, so that two runs on one machine don't meet
read -r gpus port < <(python -c '
import socket, torch
listener = socket.create_server(("", 0))
print(torch.cuda.device_count(), listener.getsockname()[1])') ||
  fail "python can't import torch; activate the environment that holds the project"
launcher=(deepspeed --quiet --master_port "$port")
if [ -n "$hostfile" ]; then
  [ -z "$ranks" ] || fail "--ranks and --hostfile: the hostfile's slots say how many ranks there are; leave --ranks out"
  check_hosts "$hostfile"
  # ranks get a terminal, so that they end when ssh does; ssh ends 15 s after its node fell silent
  export PDSH_SSH_ARGS_APPEND="-tt -o ServerAliveInterval=5 ${PDSH_SSH_ARGS_APPEND:-}"
  launcher+=(--hostfile "$hostfile" --force_multi) # without it, a single host is taken for this machine
else
  ranks=${ranks:-$gpus}
  if [ "$gpus" = 0 ]; then
    export DS_ACCELERATOR=cpu
    [ "$ranks" != 0 ] || ranks=2
    [[ " ${flags[*]}" =~ ' --'(deepspeed[-_]config|engine=) ]] || flags+=(--deepspeed-config zero2_fp32)
  fi
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / ranks > 0 ? $(nproc) / ranks : 1))}
  launcher+=(--num_gpus "$ranks")
fi
launcher+=(--module pretrain.train "${flags[@]}")
command -v deepspeed > /dev/null || fail "deepspeed: not found; activate the environment that holds the project"
printf '+%s\n' "$(printf ' %q' "${launcher[@]}")"
setsid "${launcher[@]}" & # a terminal's signals come here alone
pid=$!
# DeepSpeed's launcher would orphan the ranks, or end them at once; they finish their step and tell each other.
# shellcheck disable=SC2317 # the trap calls it
end_ranks() {
  pkill -TERM -P "$(pgrep -d, -f -- "launcher.launch .*--master_port=$port")" || kill -- "-$pid"
}
trap end_ranks TERM INT USR1
while wait "$pid" && code=0 || code=$?; [ "$code" -gt 128 ] && kill -0 "$pid" 2> /dev/null; do :; done
exit "$code"
