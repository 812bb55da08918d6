"""A character-level GPT in which every hidden matrix lives on spheres.

Queries and keys are normalized per head (as in Qwen3 and Gemma 3), each sublayer's output is
normalized before it joins the residual stream (as in Gemma 2 and 3), and the activation is a
squared ReLU, which is homogeneous. So queries, keys, values, outputs and both matrices of the MLP
can be scaled without changing the function; the audit finds that by itself. Embeddings, gains and
the head cannot. Positions enter as rotations of queries and keys.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GPT(nn.Module):
    """The network.

    Args:
        symbols: size of the alphabet.
        context: longest sequence.
        width: of the residual stream.
        heads: of attention.
        depth: how many blocks.
        seed: of the initial weights, which are normal random numbers.
    """

    def __init__(
        self,
        symbols: int,
        *,
        context: int = 64,
        width: int = 96,
        heads: int = 3,
        depth: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(symbols, width)
        self.blocks = nn.ModuleList(self.block(width, heads, context) for _ in range(depth))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, symbols, bias=False)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                # Mean square 1 throughout, far above the eps of the norms. The head starts small.
                std = {"token.weight": 1.0, "head.weight": 0.02}.get(name)
                std = parameter.shape[1] ** -0.5 if std is None else std
                nn.init.normal_(parameter, std=std, generator=generator)

    def forward(self, symbols: Tensor) -> Tensor:
        """Return logits (batch, length, symbols) of the symbol that follows each of these."""
        x = self.token(symbols)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    @staticmethod
    def block(width: int, heads: int, context: int) -> nn.Module:
        """Return one of the blocks."""
        return _Block(width, heads, context)


class Attention(nn.Module):
    """Causal attention with rotary positions, between the matrices that a block gives it.

    Args:
        width: of the residual stream.
        heads: how many, each of an even width.
        context: longest sequence.
    """

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads = heads
        angles = torch.arange(context)[:, None] * 100.0 ** -torch.linspace(
            0, 1, width // heads // 2
        )
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Mix values (batch, heads, length, width of a head) into (batch, length, width)."""
        mixed = F.scaled_dot_product_attention(
            self._turn(query), self._turn(key), value, is_causal=True
        )
        return mixed.transpose(1, 2).flatten(2)

    def split(self, x: Tensor) -> Tensor:
        """Return the heads of (batch, length, width), which come before the length then."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _turn(self, x: Tensor) -> Tensor:
        """Rotate pairs of coordinates by angles that grow with the position."""
        a, b = x.chunk(2, -1)
        cos, sin = self.cos[: x.shape[-2]], self.sin[: x.shape[-2]]
        return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


class _Block(Attention):
    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__(width, heads, context)
        # The matrices behind these take the part of their gains.
        self.before_attention = nn.RMSNorm(width, elementwise_affine=False)
        self.before_mlp = nn.RMSNorm(width, elementwise_affine=False)
        self.after_attention, self.after_mlp = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query_norm, self.key_norm = (nn.RMSNorm(width // heads) for _ in range(2))
        self.query, self.key, self.value, self.out = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.after_attention(self._attend(self.before_attention(x)))
        return x + self.after_mlp(self.down(F.relu(self.up(self.before_mlp(x))).square()))

    def _attend(self, x: Tensor) -> Tensor:
        query, key, value = (self.split(matrix(x)) for matrix in (self.query, self.key, self.value))
        return self.out(self.attend(self.query_norm(query), self.key_norm(key), value))
