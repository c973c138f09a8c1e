"""Shards to model: train, evaluate and export decoders that need no input embedding table."""
