"""What a model is measured to be."""
