"""The model in training: codes, loss, documents, recomputation, compilation."""
