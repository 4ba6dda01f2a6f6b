"""Decoder-only language model for train_lm.py."""

import torch.nn.functional as F
from torch import Tensor, nn

_HEAD_DIM = 64


class Block(nn.Module):
    """Pre-norm causal self-attention followed by a pre-norm MLP."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.heads = dim // _HEAD_DIM if dim % _HEAD_DIM == 0 else 1
        self.attention_norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attention_out = nn.Linear(dim, dim, bias=False)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))

    def _attention(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.attention_out(mixed.transpose(1, 2).flatten(-2))


class Decoder(nn.Module):
    """Token and position embeddings, blocks and an untied vocabulary head.

    `hidden` is separate from `forward` so that a loss fused with the head can skip the logits.
    """

    def __init__(self, vocab_size: int, seq_len: int, dim: int, layers: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, dim)
        self.positions = nn.Embedding(seq_len, dim)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def hidden(self, inputs: Tensor) -> Tensor:
        """Return the (batch, seq_len, dim) states that the head reads."""
        x = self.tokens(inputs) + self.positions.weight[: inputs.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.hidden(inputs))
