"""A run in its directory: what it may claim, how it continues, branches, is watched and ends."""
