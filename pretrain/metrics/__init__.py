"""What a step leaves behind in figures."""
