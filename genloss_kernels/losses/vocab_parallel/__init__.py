"""Cross entropy of logits whose classes are spread over ranks: each reduces its own and sends a few floats a row."""
