"""Sparse matrix products behind three functions."""
