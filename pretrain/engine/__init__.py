"""The step: DeepSpeed's engine, the optimizer, the clock."""
