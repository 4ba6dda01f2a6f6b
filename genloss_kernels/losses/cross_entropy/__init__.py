"""Cross entropy: log-softmax and negative log-likelihood in one pass over the logits."""
