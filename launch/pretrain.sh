#!/usr/bin/env bash
# Train a recipe with DeepSpeed on every GPU of this machine or, with a DeepSpeed hostfile, of many.
#
#   launch/pretrain.sh --recipe R --data-dir D --run-dir RUN_DIR [--hostfile F] [--ranks N] [pretrain.train flags ...]
#
# Prints the exact command, then runs it. On a machine without a GPU it starts 2 CPU ranks in fp32. The same
# command with the same run directory continues the run. --ranks takes fewer (or other) ranks than there are GPUs.
set -euo pipefail

usage() {
  sed -n '2,7s/^# \{0,1\}//p' "$0"
}

hostfile='' ranks='' config_given='' flags=()
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --hostfile) hostfile=${2:?--hostfile needs a file}; shift 2 ;;
    --hostfile=*) hostfile=${1#*=}; shift ;;
    --ranks) ranks=${2:?--ranks needs a number}; shift 2 ;;
    --ranks=*) ranks=${1#*=}; shift ;;
    *)
      case $1 in --deepspeed-config* | --deepspeed_config* | --engine=*) config_given=yes ;; esac
      flags+=("$1"); shift ;;
  esac
done
[ ${#flags[@]} -gt 0 ] || { usage >&2; exit 2; }
if [[ ! "${ranks:-1}" =~ ^[1-9][0-9]*$ ]]; then
  echo "error: --ranks $ranks: expected a number, 1 or more" >&2
  exit 2
fi
if [ -n "$hostfile" ] && [ -n "$ranks" ]; then
  echo "error: --ranks and --hostfile: the hostfile's slots say how many ranks there are; leave --ranks out" >&2
  exit 2
fi
if [ -n "$hostfile" ] && [ ! -f "$hostfile" ]; then
  echo "error: --hostfile $hostfile: no such file; it holds a line 'hostname slots=8' for each node" >&2
  exit 2
fi

launcher=(deepspeed --quiet)
if [ -n "$hostfile" ]; then
  launcher+=(--hostfile "$hostfile")
else
  # a free port, so that two runs on one machine don't meet
  read -r gpus port < <(python -c '
import socket, torch
listener = socket.create_server(("", 0))
print(torch.cuda.device_count(), listener.getsockname()[1])')
  ranks=${ranks:-$gpus}
  if [ "$gpus" = 0 ]; then
    export DS_ACCELERATOR=cpu
    [ "$ranks" != 0 ] || ranks=2
    [ -n "$config_given" ] || flags+=(--deepspeed-config zero2_fp32)
  fi
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / ranks > 0 ? $(nproc) / ranks : 1))}
  launcher+=(--num_gpus "$ranks" --master_port "$port")
fi

printf '+'
printf ' %q' "${launcher[@]}" --module pretrain.train "${flags[@]}"
printf '\n'
exec "${launcher[@]}" --module pretrain.train "${flags[@]}"
