"""What watches a run from outside of its steps: ranks that watch one another, and signals."""
