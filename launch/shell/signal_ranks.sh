#!/bin/sh
# Sends a signal to the ranks of a job on this machine, and prints the process ids of those who got
# it. Signal 0 reaches nobody: it only tells who is there.
#
#   sh signal_ranks.sh PORTS SIGNAL      PORTS: 29500|29501, where the ranks of its starts met
#
# launch/processes.py sends this text to other hosts too. pdsh puts names into a percent sign and
# the letter behind it, so there is none of those here.
ports=$1
signal=$2
cd /proc || exit 1

# Process ids of those whose FILE, cmdline or environ, has an entry that is the PATTERN.
processes_with() { # FILE PATTERN
  grep -lzxsE -e "$2" [0-9]*/"$1" | cut -d/ -f1
}

# DeepSpeed's launcher on a node gets none but SIGKILL: of others it would orphan its ranks, or end
# them in the middle of a step.
if [ "$signal" = 9 ]; then
  for launcher in $(processes_with cmdline "--master_port=($ports)"); do
    kill -9 "$launcher" 2> /dev/null
  done
fi

# What a rank has started, such as workers of torch's compiler, has its environment, not its command
# line: a flag of DeepSpeed's launcher or, of srun's ranks, the trainer's name. That launcher has the
# name too.
is_rank() { # PROCESS_ID
  grep -qzxs -e '--local_rank=[0-9]*' "$1/cmdline" && return
  grep -qzxs -e 'pretrain[.]train' "$1/cmdline" && ! grep -qzs -e '^--master_port=' "$1/cmdline"
}

for rank in $(processes_with environ "MASTER_PORT=($ports)"); do
  if is_rank "$rank"; then
    kill -s "$signal" "$rank" && echo "$rank"
  fi
done
