#!/usr/bin/env bash
# Build a data set on every core of this machine or, with an MPI hostfile, of many.
#
#   launch/build_shards.sh --mixture M --output-dir D [--ranks N] [--hostfile F] [data_prep.build_shards flags ...]
#
# Prints the exact command, then runs it. One rank for each 2 cores, unless --ranks says otherwise; the output is the
# same. After a stop or a kill, the same command goes on from the finished units. With --hostfile (a host a line),
# all hosts must see M, its files and D, and --ranks is needed.
set -euo pipefail

usage() {
  sed -n '2,8s/^# \{0,1\}//p' "$0"
}

hostfile='' ranks='' flags=()
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --hostfile) hostfile=${2:?--hostfile needs a file}; shift 2 ;;
    --ranks) ranks=${2:?--ranks needs a number}; shift 2 ;;
    *) flags+=("$1"); shift ;;
  esac
done
[ ${#flags[@]} -gt 0 ] || { usage >&2; exit 2; }
if [[ ! "${ranks:-1}" =~ ^[1-9][0-9]*$ ]]; then
  echo "error: --ranks $ranks: expected a number, 1 or more" >&2
  exit 2
fi
if [ -n "$hostfile" ] && { [ ! -f "$hostfile" ] || [ -z "$ranks" ]; }; then
  echo "error: --hostfile $hostfile: expected a file with a host a line, and --ranks beside it" >&2
  exit 2
fi

ranks=${ranks:-$((($(nproc) + 1) / 2))}
launcher=()
if [ "$ranks" -gt 1 ] || [ -n "$hostfile" ]; then
  launcher=(mpiexec -n "$ranks" ${hostfile:+-hostfile "$hostfile"})
fi
printf '+'
printf ' %q' "${launcher[@]}" python -m data_prep.build_shards "${flags[@]}"
printf '\n'
exec "${launcher[@]}" python -m data_prep.build_shards "${flags[@]}"
