"""Tokenizers: learned, loaded, proved against the reference; and what they lose."""
