"""Negative log-likelihood of a Gaussian with predicted mean and variance."""
