"""A run in its directory: what it may claim, how it trains, continues, branches and ends."""
