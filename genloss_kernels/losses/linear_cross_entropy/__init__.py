"""Linear layer and cross entropy together: the logits of a whole batch never exist."""
