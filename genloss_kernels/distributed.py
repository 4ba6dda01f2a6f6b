"""Losses over ranks: vocabularies that are spread over a process group."""

from .losses.vocab_parallel.sharded import VocabShard

__all__ = ["VocabShard"]
