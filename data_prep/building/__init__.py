"""What a build does: mixture, plan, units of work, the ranks that share them, their shards."""
