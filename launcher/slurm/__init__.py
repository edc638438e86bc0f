"""Jobs on SLURM: the batch script, the agent on each node, what SLURM says."""
