"""The checkpoints of a run: a table, and which one to use."""
