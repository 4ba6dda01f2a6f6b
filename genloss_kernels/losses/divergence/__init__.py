"""Divergences between categorical distributions given by their logits, and their entropy."""
