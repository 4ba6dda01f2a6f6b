"""Losses of energy-based models."""
