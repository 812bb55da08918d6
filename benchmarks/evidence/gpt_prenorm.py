"""The same GPT in its common form: pre-norm with gains, SwiGLU, nothing normalized elsewhere.

Blocks as in Llama: RMSNorm with a gain before attention and before the MLP, rotary positions, no
norm of queries, keys or of what a sublayer writes. No matrix lives on a sphere of its own here:
scales of queries and keys, of values and outputs, of up and down trade off against each other.
Matrices that write to the residual stream start smaller by one over the root of their number, as in
GPT-2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.evidence.gpt import GPT, Attention


class PreNormGPT(GPT):
    """The network; arguments as of :class:`~benchmarks.evidence.gpt.GPT`."""

    def __init__(self, symbols: int, **sizes: int) -> None:
        super().__init__(symbols, **sizes)
        with torch.no_grad():
            for block in self.blocks:
                for matrix in (block.out, block.down):
                    matrix.weight /= (2 * len(self.blocks)) ** 0.5

    @staticmethod
    def block(width: int, heads: int, context: int) -> nn.Module:
        """Return one of the blocks."""
        return _Block(width, heads, context)


class _Block(Attention):
    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__(width, heads, context)
        inner = 8 * width // 3  # as many weights as two matrices of four times the width
        self.before_attention, self.before_mlp = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query, self.key, self.value, self.out = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        read = self.before_attention(x)
        parts = (self.split(matrix(read)) for matrix in (self.query, self.key, self.value))
        x = x + self.out(self.attend(*parts))
        read = self.before_mlp(x)
        return x + self.down(F.silu(self.gate(read)) * self.up(read))
