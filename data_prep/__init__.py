"""Corpus to shards: train a tokenizer, build, verify and show data sets of uint16 token ids."""
