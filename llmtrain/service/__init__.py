"""The checkpoint service: a process beside training, which knows training by its run folder alone."""
