"""From shards to a rank's samples, and whether they are what was built."""
