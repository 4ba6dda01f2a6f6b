"""Cross entropy of logits whose classes are spread over ranks: each reduces its own, and a few floats a row are exchanged."""
