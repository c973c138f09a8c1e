#!/bin/sh
# Becomes a command. When the other end of standard input is closed, the command is killed, with all
# that is still in its process group: so nothing outlives whoever holds that end, however that ends.
#
#   sh guarded.sh COMMAND [ARGUMENT ...]

# The guard gets the pipe as 3, because a shell gives /dev/null to what it starts in the background;
# the command reads nothing, and must not keep the pipe open.
exec 3<&0 < /dev/null

# Ranks of srun are in no group of this machine: they end with srun when that is asked to end.
asked=
[ "$1" != srun ] || asked=$$

# The guard is a shell of its own, so that its command line names no run: who looks for processes of
# a run finds launcher and ranks. Signals that ask the group to end are not for the guard.
sh -c '
  trap "" TERM INT USR1
  read -r _ <&3
  if [ -n "$1" ] && kill "$1" 2> /dev/null; then
    for _ in 1 2 3 4 5; do
      kill -0 "$1" 2> /dev/null || break
      sleep 1
    done
  fi
  kill -9 0
' guard "$asked" &

exec 3<&-
exec "$@"
