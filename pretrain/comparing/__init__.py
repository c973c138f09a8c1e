"""Matched runs, compared: the matrix of them, how they are trained, and what their figures show."""
