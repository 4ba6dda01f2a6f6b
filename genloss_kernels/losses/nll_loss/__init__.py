"""Negative log-likelihood of given log-probabilities."""
