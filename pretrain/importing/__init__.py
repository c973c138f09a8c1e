"""Foreign weights and those of exports, as the beginning of a run."""
