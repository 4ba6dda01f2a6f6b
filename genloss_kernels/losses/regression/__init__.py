"""Losses between predictions and real-valued targets."""
