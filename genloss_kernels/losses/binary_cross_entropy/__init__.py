"""Sigmoid and binary cross entropy in one pass."""
