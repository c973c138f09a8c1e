#!/bin/sh
# Slurm's controller and, as often as its name is read, a node's daemon: slurm.sh CONFIGURATION.
#
# To be run as the first process of new process and mount namespaces: when the other end of standard
# input is closed it ends, and the kernel ends all daemons and jobs with it.
slurmctld -D -f "$1" < /dev/null &
while read -r node; do
  slurmd -D -f "$1" -N "$node" < /dev/null &
done
