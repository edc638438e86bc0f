"""Keeps a run going: on one machine, and on each node of a job."""
