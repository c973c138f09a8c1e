"""Exports under other releases of transformers than the one that the tests run with; see
tests/pretrain/hf/test_matrix.py.
"""
