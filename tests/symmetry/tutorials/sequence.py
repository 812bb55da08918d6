"""Sequences by other means: scans, convolutions in time, masks and positions made on the way."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, weight_norm

from symmetry.tutorials.case import Case, call, tokens, trade

Wrap = Callable[[nn.Module], nn.Module]


class MaskedMean(nn.Module):
    """A mask is filled row by row, as lengths say."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.fc, self.out = nn.Linear(6, 6, bias=False), nn.Linear(6, 2)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        mask = torch.zeros(ids.size(0), ids.size(1))
        for i, length in enumerate(lengths):
            mask[i, :length] = 1
        h = torch.relu(self.fc(self.embedding(ids))) * mask.unsqueeze(-1)
        return self.out(h.sum(dim=1) / mask.sum(dim=1, keepdim=True))


class PositionsOnTheWay(nn.Module):
    """Sines and cosines are written into zeros at every call."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.width = width
        self.embedding = nn.Embedding(13, width)
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 6), nn.Linear(6, 3)

    def positions(self, length: int) -> Tensor:
        pe = torch.zeros(length, self.width)
        for pos in range(length):
            for i in range(0, self.width, 2):
                pe[pos, i] = math.sin(pos / (10000 ** (i / self.width)))
                pe[pos, i + 1] = math.cos(pos / (10000 ** (i / self.width)))
        return pe.unsqueeze(0)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.positions(ids.size(1))
        return self.fc2(F.relu(self.fc1(self.norm(x).mean(dim=1))))


class AnnotatedNorm(nn.Module):
    def __init__(self, features: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.a_2, self.b_2 = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        return self.a_2 * (x - mean) / (std + self.eps) + self.b_2


class MultiHeaded(nn.Module):
    def __init__(self, h: int, width: int) -> None:
        super().__init__()
        self.d_k, self.h = width // h, h
        self.linears = nn.ModuleList(copy.deepcopy(nn.Linear(width, width)) for _ in range(4))
        self.attn: Tensor | None = None

    def forward(self, query: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        n = query.size(0)
        q, k, v = (
            lin(x).view(n, -1, self.h, self.d_k).transpose(1, 2)
            for lin, x in zip(self.linears, (query, memory, memory), strict=False)
        )
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(self.d_k)
        scores = scores.masked_fill(mask.unsqueeze(1) == 0, -1e9)
        self.attn = scores.softmax(dim=-1)
        x = torch.matmul(self.attn, v).transpose(1, 2).contiguous().view(n, -1, self.h * self.d_k)
        return self.linears[-1](x)


class AnnotatedLayer(nn.Module):
    def __init__(self, width: int, crossed: bool) -> None:
        super().__init__()
        self.attn, self.src = MultiHeaded(2, width), MultiHeaded(2, width) if crossed else None
        self.w_1, self.w_2 = nn.Linear(width, 10), nn.Linear(10, width)
        self.norms = nn.ModuleList(AnnotatedNorm(width) for _ in range(3 if crossed else 2))
        self.dropout = nn.Dropout(0.1)

    def forward(
        self, x: Tensor, mask: Tensor, memory: Tensor | None = None, seen: Tensor | None = None
    ) -> Tensor:
        y = self.norms[0](x)
        x = x + self.dropout(self.attn(y, y, mask))
        if self.src is not None:
            x = x + self.dropout(self.src(self.norms[1](x), memory, seen))
        return x + self.dropout(self.w_2(F.relu(self.w_1(self.norms[-1](x)))))


class AnnotatedTransformer(nn.Module):
    """Encoder and decoder, pre-norm, with a padding mask and a mask of what comes later."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.scale = math.sqrt(width)
        self.src_embed, self.tgt_embed = nn.Embedding(9, width), nn.Embedding(10, width)
        self.encoder, self.decoder = AnnotatedLayer(width, False), AnnotatedLayer(width, True)
        self.enc_norm, self.dec_norm = AnnotatedNorm(width), AnnotatedNorm(width)
        self.proj = nn.Linear(width, 10)

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        seen = (src != 0).unsqueeze(-2)
        later = torch.triu(torch.ones(1, tgt.size(1), tgt.size(1)), diagonal=1).type(torch.uint8)
        memory = self.enc_norm(self.encoder(self.src_embed(src) * self.scale, seen))
        x = self.decoder(self.tgt_embed(tgt) * self.scale, later == 0, memory, seen)
        return F.log_softmax(self.proj(self.dec_norm(x)), dim=-1)


def _attention(path: str) -> tuple[dict[str, int], ...]:
    q, k, v, o = (f"{path}.linears.{i}" for i in range(4))
    return trade(f"{q}.*", f"{k}.weight"), trade(f"{v}.*", f"{o}.weight")


_E, _D, _L = "encoder.", "decoder.", ".linears."
_ANNOTATED = (
    trade(f"src_embed.weight {_E}attn{_L}3.* {_E}w_2.*"),
    trade(
        f"tgt_embed.weight {_D}attn{_L}3.weight {_D}attn{_L}3.bias {_D}src{_L}3.* {_D}w_2.*"
    ),
    *(
        trade(
            f"{part}norms.0.a_2 {part}norms.0.b_2",
            " ".join(f"{part}attn{_L}{i}.weight" for i in range(3)),
        )
        for part in (_E, _D)
    ),
    *(
        trade(f"{part}norms.{i}.a_2 {part}norms.{i}.b_2", f"{part}w_1.weight")
        for part, i in ((_E, 1), (_D, 2))
    ),
    *(trade(f"{part}w_1.*", f"{part}w_2.weight") for part in (_E, _D)),
    *_attention(f"{_E}attn"),
    *_attention(f"{_D}attn"),
    *_attention(f"{_D}src"),
    trade(f"{_D}norms.1.a_2 {_D}norms.1.b_2", f"{_D}src{_L}0.weight"),
    trade("enc_norm.a_2 enc_norm.b_2", f"{_D}src{_L}1.weight {_D}src{_L}2.weight"),
    trade("dec_norm.a_2 dec_norm.b_2", "proj.weight"),
)  # fmt: skip


class SelectiveScan(nn.Module):
    """A state that is overwritten at every step; what it keeps depends on what it reads."""

    def __init__(self, width: int, inner: int, states: int = 3) -> None:
        super().__init__()
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, 3, groups=inner, padding=2)
        self.dt_proj = nn.Linear(inner, inner)
        self.B_proj, self.C_proj = (nn.Linear(inner, states, bias=False) for _ in range(2))
        rates = torch.arange(1, states + 1, dtype=torch.float32).repeat(inner, 1)
        self.A_log, self.D = nn.Parameter(torch.log(rates)), nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = F.silu(self.conv1d(x.transpose(1, 2))[..., :length]).transpose(1, 2)
        dt = F.softplus(self.dt_proj(x))
        B, C = self.B_proj(x), self.C_proj(x)
        dA = torch.exp(torch.einsum("bld,dn->bldn", dt, -torch.exp(self.A_log.float())))
        dBx = torch.einsum("bld,bln->bldn", dt * x, B)
        state = torch.zeros(*dA[:, 0].shape, dtype=x.dtype)
        out = []
        for t in range(length):
            state.mul_(dA[:, t]).add_(dBx[:, t])
            out.append(torch.einsum("bdn,bn->bd", state, C[:, t]))
        y = torch.stack(out, dim=1) + x * self.D
        return self.out_proj(y * F.silu(z))


class Mamba(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(9, width), nn.RMSNorm(width)
        self.mixer = SelectiveScan(width, 5)
        self.norm_f, self.lm_head = nn.RMSNorm(width), nn.Linear(width, 9, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = x + self.mixer(self.norm(x))
        return self.lm_head(self.norm_f(x))


class TemporalBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, dilation: int, wrap: Wrap) -> None:
        super().__init__()
        pad = 2 * dilation
        self.conv1 = wrap(nn.Conv1d(inputs, outputs, 3, padding=pad, dilation=dilation))
        self.conv2 = wrap(nn.Conv1d(outputs, outputs, 3, padding=pad, dilation=dilation))
        self.dropout, self.pad = nn.Dropout(0.2), pad
        self.downsample = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.dropout(F.relu(self.conv1(x)[:, :, : -self.pad].contiguous()))
        out = self.dropout(F.relu(self.conv2(out)[:, :, : -self.pad].contiguous()))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class TCN(nn.Module):
    """Causal convolutions with normalized weights."""

    def __init__(self, wrap: Wrap) -> None:
        super().__init__()
        self.network = nn.Sequential(TemporalBlock(3, 4, 1, wrap), TemporalBlock(4, 4, 2, wrap))
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.network(x)[:, :, -1])


def _tcn(gain: str, direction: str) -> dict[str, Any]:
    def conv(i: int, j: int, part: str) -> str:
        return f"network.{i}.conv{j}.{part}"

    directions = tuple(conv(i, j, direction) for i in range(2) for j in (1, 2))
    stream = " ".join(f"{conv(i, 2, gain)} {conv(i, 2, 'bias')}" for i in range(2))
    return {
        "symmetries": (
            *(trade(n) for n in directions),
            trade(f"{conv(0, 1, gain)} {conv(0, 1, 'bias')}", conv(0, 2, gain)),
            trade(f"{conv(1, 1, gain)} {conv(1, 1, 'bias')}", conv(1, 2, gain)),
            trade(f"network.0.downsample.* {stream}", f"{conv(1, 1, gain)} linear.weight"),
        ),
        "spheres": directions,
        "granularity": dict.fromkeys(directions, "per filter"),
        "mode": "train",
    }


class WaveNet(nn.Module):
    """Gates of tanh and sigmoid; what comes out is the sum of what every layer lays aside."""

    def __init__(self, width: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.start = nn.Conv1d(1, width, 1)
        self.filter, self.gate = (
            nn.ModuleList(nn.Conv1d(width, width, 2, dilation=2**i) for i in range(layers))
            for _ in range(2)
        )
        self.residual = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(layers))
        self.skip = nn.ModuleList(nn.Conv1d(width, 5, 1) for _ in range(layers))
        self.end1, self.end2 = nn.Conv1d(5, 6, 1), nn.Conv1d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, skip = self.start(x), torch.zeros(1)
        for i in range(len(self.filter)):
            y = torch.tanh(self.filter[i](x)) * torch.sigmoid(self.gate[i](x))
            s = self.skip[i](y)
            skip = s + (skip[:, :, -s.size(2) :] if skip.dim() == 3 else 0)
            x = self.residual[i](y) + x[:, :, -y.size(2) :]
        return self.end2(F.relu(self.end1(F.relu(skip))))


class LinearAttention(nn.Module):
    """Keys and queries through elu + 1, and a running sum in the place of a softmax."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(8, width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.head = nn.Linear(width, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        y = self.norm(x)
        q, k, v = F.elu(self.q(y)) + 1, F.elu(self.k(y)) + 1, self.v(y)
        memory = torch.einsum("btd,bte->btde", k, v).cumsum(dim=1)
        total = torch.einsum("btd,btd->bt", q, k.cumsum(dim=1))
        y = torch.einsum("btd,btde->bte", q, memory) / (total.unsqueeze(-1) + 1e-6)
        return self.head(x + self.o(y))


CASES = (
    Case(
        "mask filled row by row",
        MaskedMean,
        lambda: call(tokens(4, 5, among=11), torch.tensor([5, 3, 4, 2])),
        symmetries=(trade("embedding.weight", "fc.weight"), trade("fc.weight", "out.weight")),
    ),
    Case(
        "positions written into zeros",
        PositionsOnTheWay,
        lambda: call(tokens(3, 4, among=13)),
        symmetries=(trade("norm.*", "fc1.weight"), trade("fc1.*", "fc2.weight")),
        note="sines stand beside the embedding and have a size of their own",
    ),
    Case(
        "encoder and decoder, annotated",
        AnnotatedTransformer,
        lambda: call(tokens(2, 4, among=9), tokens(2, 5, among=10)),
        symmetries=_ANNOTATED,
        inert=tuple(
            f"{n}.linears.1.bias" for n in ("encoder.attn", "decoder.attn", "decoder.src")
        ),
        mode="train",
    ),
    Case(
        "selective scan in place",
        Mamba,
        lambda: call(tokens(2, 5, among=9)),
        symmetries=(
            trade("embedding.weight mixer.out_proj.weight"),
            trade("norm.weight", "mixer.in_proj.weight"),
            trade("mixer.B_proj.weight", "mixer.C_proj.weight"),
            trade("mixer.C_proj.weight mixer.D", "mixer.out_proj.weight"),
            trade("norm_f.weight", "lm_head.weight"),
        ),
        note="inference code: a state that autograd saved is overwritten",
    ),
    Case(
        "convolutions in time, weight_norm of old",
        lambda: TCN(weight_norm),
        lambda: call(torch.randn(3, 3, 6)),
        **_tcn("weight_g", "weight_v"),
    ),
    Case(
        "convolutions in time, weight_norm of today",
        lambda: TCN(parametrizations.weight_norm),
        lambda: call(torch.randn(3, 3, 6)),
        **_tcn("parametrizations.weight.original0", "parametrizations.weight.original1"),
    ),
    Case(
        "gated convolutions with skips",
        WaveNet,
        lambda: call(torch.randn(2, 1, 8)),
        symmetries=(
            trade(
                "start.* residual.0.*", "filter.0.weight gate.0.weight filter.1.weight "
                "gate.1.weight"
            ),
            trade("skip.0.* skip.1.*", "end1.weight"),
            trade("end1.*", "end2.weight"),
        ),
        inert=("residual.1.weight", "residual.1.bias"),
        note="nobody reads the last residual",
    ),
    Case(
        "linear attention",
        LinearAttention,
        lambda: call(tokens(2, 5, among=8)),
        symmetries=(
            trade("embedding.weight o.*", "head.weight"),
            trade("norm.*", "q.weight k.weight v.weight"),
            trade("v.*", "o.weight"),
        ),
    ),
)  # fmt: skip
