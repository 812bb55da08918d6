"""Networks of tokens and of sound."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.atlas.networks.inputs import Example, normal, tokens


class _CausalBlock(nn.Module):
    """The block of a small GPT: one fused projection, flash attention, GELU."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn = nn.Linear(width, 3 * width, bias=False)
        self.c_proj = nn.Linear(width, width, bias=False)
        self.c_fc = nn.Linear(width, 4 * width, bias=False)
        self.c_out = nn.Linear(4 * width, width, bias=False)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in self.c_attn(self.ln_1(x)).chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).flatten(2))
        return x + self.c_out(F.gelu(self.c_fc(self.ln_2(x))))


class _SmallGPT(nn.Module):
    def __init__(self, width: int = 64, vocabulary: int = 64) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(32, width)
        self.blocks = nn.Sequential(*(_CausalBlock(width, 4) for _ in range(2)))
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        return self.head(self.ln_f(self.blocks(x)))


def nanogpt() -> Example:
    return _SmallGPT(), (tokens(),)


class _RMSNormedBlock(nn.Module):
    """The block of GPT speedruns: norms without gains, QK-norm, squared ReLU."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        y = F.rms_norm(x, x.shape[-1:])
        q, k, v = (
            m(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.q, self.k, self.v)
        )
        q, k = (F.rms_norm(t, t.shape[-1:]) for t in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(F.rms_norm(x, x.shape[-1:]))).square())


class _SpeedrunGPT(nn.Module):
    def __init__(self, width: int = 64, vocabulary: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*(_RMSNormedBlock(width, 4) for _ in range(2)))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = F.rms_norm(self.embed(ids), (self.embed.embedding_dim,))
        x = F.rms_norm(self.blocks(x), x.shape[-1:])
        return 15 * torch.tanh(self.head(x) / 15)


def speedrun_gpt() -> Example:
    return _SpeedrunGPT(), (tokens(),)


class _Encoder(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0, batch_first=True)
        self.embed = nn.Embedding(64, width)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(width, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(ids)).mean(1))


def torch_transformer() -> Example:
    return _Encoder(), (tokens(),)


class _Recurrent(nn.Module):
    def __init__(self, cell: type[nn.RNNBase], vocabulary: int = 64, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.cell = cell(width, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.cell(self.embed(ids))[0])


def lstm() -> Example:
    return _Recurrent(nn.LSTM), (tokens(),)


def gru() -> Example:
    return _Recurrent(nn.GRU), (tokens(),)


class _WaveBlock(nn.Module):
    """A block of a temporal convolutional network with weight norm, gates and a skip."""

    def __init__(self, planes: int, dilation: int) -> None:
        super().__init__()
        normed = nn.utils.parametrizations.weight_norm
        self.pad = 2 * dilation
        self.conv = normed(nn.Conv1d(planes, 2 * planes, 3, dilation=dilation))
        self.out = normed(nn.Conv1d(planes, planes, 1))

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.conv(F.pad(x, (self.pad, 0))).chunk(2, dim=1)
        return x + self.out(value.tanh() * gate.sigmoid())


def wavenet() -> Example:
    blocks = (_WaveBlock(16, 2**k) for k in range(3))
    return nn.Sequential(
        nn.Conv1d(1, 16, 1), *blocks, nn.ReLU(), nn.Conv1d(16, 8, 1)
    ), (normal(2, 1, 40),)  # fmt: skip
