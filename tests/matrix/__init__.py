"""Exports under other releases of transformers than the one that the tests run with; see
tests/test_matrix.py.
"""
