"""Losses of generative adversarial networks, and the penalties on their discriminators' gradients."""
