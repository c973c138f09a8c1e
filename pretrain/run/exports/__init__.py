"""Exports that a run has made of its checkpoints while it trains."""
