"""Reconstruction and divergence of a variational autoencoder in one pass."""
