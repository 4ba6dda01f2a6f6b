"""Cosine embedding loss of pairs of rows."""
