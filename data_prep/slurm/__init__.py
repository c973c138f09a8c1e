"""What Slurm's variables say to a process that it started."""
