"""What a step costs: memory, operations, and what devices give."""
