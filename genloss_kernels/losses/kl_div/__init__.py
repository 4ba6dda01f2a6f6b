"""Kullback-Leibler divergence of given log-probabilities."""
