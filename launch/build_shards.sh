#!/usr/bin/env bash
# Build a data set on every core of this machine or, with an MPI hostfile, of many.
#
#   launch/build_shards.sh --mixture M --output-dir D [--ranks N] [--hostfile F] [data_prep.build_shards flags ...]
#
# Prints the exact command, then runs it. One rank for each 2 cores, unless --ranks says otherwise; the output is the
# same. After a stop or a kill, the same command goes on from the finished units. With --hostfile (a host a line),
# all hosts must see M, its files and D, and --ranks is needed.
set -euo pipefail

# shellcheck source=launch/shell/common.sh
source "$(dirname "$0")/shell/common.sh"
parse_flags "$@"
[ -z "$hostfile" ] || [ -n "$ranks" ] || fail "--hostfile $hostfile: needs --ranks beside it"

ranks=${ranks:-$((($(nproc) + 1) / 2))}
launcher=(mpiexec -n "$ranks" ${hostfile:+-hostfile "$hostfile"})
[ "$ranks" -gt 1 ] || [ -n "$hostfile" ] || launcher=() # one rank needs none
run "${launcher[@]}" python -m data_prep.build_shards "${flags[@]}"
