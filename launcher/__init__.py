"""Decides where and how a run executes. Never imports torch."""
