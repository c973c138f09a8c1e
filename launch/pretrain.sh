#!/usr/bin/env bash
# Train a recipe with DeepSpeed on every GPU of this machine or, with a DeepSpeed hostfile, of many.
#
#   launch/pretrain.sh --recipe R --data-dir D --run-dir RUN_DIR
#                      [--hostfile F] [--ranks N] [--max-restarts M] [pretrain.train flags ...]
#
# Prints the exact command, then runs it. On a machine without a GPU it starts 2 CPU ranks in fp32.
# The same command with the same run directory continues the run. --ranks takes fewer (or other)
# ranks than there are GPUs. --max-restarts does so by itself after a failure, so many times, on
# what machines and GPUs are left. SIGTERM, SIGINT (Ctrl-C) or SIGUSR1 end it after the step, saved;
# a second one, more than 2 s later, at once.
#
# In an allocation of Slurm (salloc, or a batch script of your own) it takes all nodes of that, by
# srun, unless --hostfile or --ranks says otherwise; --requeue has the job queued again when Slurm
# warns of its end. launch/pretrain.slurm is such a script.
set -euo pipefail

# shellcheck source=launch/shell/common.sh
source "$(dirname "$0")/shell/common.sh"
case " $* " in *" -h "* | *" --help "*) usage; exit 0 ;; esac
need_tool deepspeed "activate the environment that holds the project"
if [[ " $* " == *" --hostfile"* ]]; then
  need_tool pdsh "DeepSpeed starts ranks on other machines with it"
fi
exec python "$(dirname "$0")/supervise.py" "$@"
