"""What a build does: the mixture, its units of work, the ranks that share them, the shards of each."""
