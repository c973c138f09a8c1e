"""Who am I among the ranks, and how they meet and agree."""
