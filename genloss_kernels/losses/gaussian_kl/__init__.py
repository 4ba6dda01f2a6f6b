"""KL divergence between diagonal Gaussians."""
