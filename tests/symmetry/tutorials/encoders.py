"""Encoders: BERT, T5, a vision transformer, two towers, a perceiver."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from symmetry.tutorials.case import Case, call, tokens, trade


class BertLayer(nn.Module):
    """Post-norm; an additive mask hides the padding."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.dense = nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-12)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(0.1)

    def shaped(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, self.size).permute(0, 2, 1, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (self.shaped(f(x)) for f in (self.query, self.key, self.value))
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(self.size) + mask
        weights = self.dropout(nn.functional.softmax(scores, dim=-1))
        y = torch.matmul(weights, v).permute(0, 2, 1, 3).contiguous().flatten(2)
        x = self.norm1(x + self.dropout(self.dense(y)))
        return self.norm2(x + self.dropout(self.down(F.gelu(self.up(x)))))


class Bert(nn.Module):
    def __init__(
        self, pooled: str, hidden: str, words: int = 14, width: int = 8, layers: int = 1
    ) -> None:
        super().__init__()
        self.pooled, self.hidden = pooled, hidden
        self.word = nn.Embedding(words, width, padding_idx=0)
        self.position, self.kind = nn.Embedding(10, width), nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.layer = nn.ModuleList(BertLayer(width, 2) for _ in range(layers))
        self.pooler = nn.Linear(width, width)
        self.classifier = nn.Linear(width, 3)
        self.register_buffer("position_ids", torch.arange(10).unsqueeze(0), persistent=False)

    def additive(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        low = torch.finfo(dtype).min if self.hidden == "least" else -1e9
        return (1.0 - mask[:, None, None, :].to(dtype)) * low

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, kinds: Tensor | None = None
    ) -> Tensor:
        length = input_ids.shape[1]
        if attention_mask is None:
            attention_mask = torch.ones(input_ids.shape, device=input_ids.device)
        if kinds is None:
            kinds = torch.zeros_like(input_ids)
        x = self.word(input_ids) + self.kind(kinds) + self.position(self.position_ids[:, :length])
        x = self.norm(x)
        for layer in self.layer:
            x = layer(x, self.additive(attention_mask, x.dtype))
        if self.pooled == "mean":
            m = attention_mask.unsqueeze(-1).expand(x.size()).float()
            x = (x * m).sum(1) / torch.clamp(m.sum(1), min=1e-9)
        else:
            x = torch.tanh(self.pooler(x[:, 0]))
        return self.classifier(x)


_BERT = (
    trade("word.weight position.weight kind.weight"),
    trade("norm.* layer.0.dense.*", "layer.0.query.weight layer.0.key.weight layer.0.value.weight"),
    trade("layer.0.query.*", "layer.0.key.weight"),
    trade("layer.0.value.*", "layer.0.dense.weight"),
    trade("layer.0.norm1.* layer.0.down.*", "layer.0.up.weight"),
)


class T5Attention(nn.Module):
    def __init__(self, width: int, heads: int, positions: bool) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        if positions:
            self.relative_attention_bias = nn.Embedding(8, heads)

    def bias(self, length: int) -> Tensor:
        place = torch.arange(length)
        distance = place[None, :] - place[:, None]
        bucket = (distance > 0).long() * 4
        far = distance.abs()
        log = 2 + (torch.log(far.float() / 2 + 1e-9) / math.log(8 / 2) * 2).long()
        bucket += torch.where(far < 2, far, torch.min(log, torch.full_like(log, 3)))
        return self.relative_attention_bias(bucket).permute(2, 0, 1).unsqueeze(0)

    def forward(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v = (
            f(x).view(*x.shape[:2], self.heads, -1).transpose(1, 2)
            for f in (self.q, self.k, self.v)
        )
        bias = self.bias(x.shape[1]) if bias is None else bias
        scores = torch.matmul(q, k.transpose(3, 2))
        scores += bias
        weights = F.softmax(scores.float(), dim=-1).type_as(scores)
        return self.o(torch.matmul(weights, v).transpose(1, 2).reshape(x.shape)), bias


class T5Norm(nn.Module):
    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.variance_epsilon))


class T5Block(nn.Module):
    def __init__(self, width: int, positions: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = T5Norm(width), T5Norm(width)
        self.attention = T5Attention(width, 2, positions)
        self.wi, self.wo = nn.Linear(width, 12, bias=False), nn.Linear(12, width, bias=False)

    def forward(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        y, bias = self.attention(self.norm1(x), bias)
        x = x + y
        return x + self.wo(F.relu(self.wi(self.norm2(x)))), bias


class T5Encoder(nn.Module):
    """The first block owns the biases of relative positions; the table is the head as well."""

    def __init__(self, words: int = 12, width: int = 8) -> None:
        super().__init__()
        self.shared = nn.Embedding(words, width)
        self.block = nn.ModuleList(T5Block(width, i == 0) for i in range(2))
        self.final = T5Norm(width)

    def forward(self, ids: Tensor) -> Tensor:
        x, bias = self.shared(ids), None
        for block in self.block:
            x, bias = block(x, bias)
        x = self.final(x) * (x.shape[-1] ** -0.5)
        return F.linear(x, self.shared.weight)


def _t5_block(i: int) -> tuple[dict[str, int], ...]:
    b, a = f"block.{i}.", f"block.{i}.attention."
    return (
        trade(f"{b}norm1.weight", f"{a}q.weight {a}k.weight {a}v.weight"),
        trade(f"{a}q.weight", f"{a}k.weight"),
        trade(f"{a}v.weight", f"{a}o.weight"),
        trade(f"{b}norm2.weight", f"{b}wi.weight"),
        trade(f"{b}wi.weight", f"{b}wo.weight"),
    )


class ViTBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 12), nn.GELU(), nn.Linear(12, dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A class token in front; a mask token for pretraining, which classification never touches."""

    def __init__(self, dim: int = 8, patch: int = 4, image: int = 8, classes: int = 5) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, patch, stride=patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, dim) * 0.02)
        self.blocks = nn.ModuleList(ViTBlock(dim, 2) for _ in range(1))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor, bool_masked_pos: Tensor | None = None) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        if bool_masked_pos is not None:
            masked = bool_masked_pos.unsqueeze(-1).type_as(x)
            x = x * (1 - masked) + self.mask_token.expand(x.shape) * masked
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


_VIT = (
    trade(
        "patch_embed.* cls_token pos_embed blocks.0.attn.out_proj.* blocks.0.mlp.2.weight "
        "blocks.0.mlp.2.bias"
    ),
    trade("blocks.0.norm1.*", "blocks.0.attn.in_proj_weight"),
    trade("blocks.0.norm2.*", "blocks.0.mlp.0.weight"),
    trade("norm.*", "head.weight"),
)


class TwoTowers(nn.Module):
    """Pictures and captions in one space; the temperature is learned as a logarithm."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.visual = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.image_projection = nn.Linear(5, width, bias=False)
        self.token_embedding = nn.Embedding(16, width)
        self.positional_embedding = nn.Parameter(torch.randn(8, width) * 0.1)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, width) * width**-0.5)
        self.logit_scale = nn.Parameter(torch.ones([]) * math.log(1 / 0.07))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.image_projection(self.visual(image).flatten(1))
        x = self.token_embedding(text) + self.positional_embedding[: text.shape[1]]
        x = self.ln_final(x)
        said = x[torch.arange(x.shape[0]), text.argmax(dim=-1)] @ self.text_projection
        seen = seen / seen.norm(dim=1, keepdim=True)
        said = said / said.norm(dim=1, keepdim=True)
        logits = self.logit_scale.exp() * seen @ said.t()
        return logits, logits.t()


class PreNorm(nn.Module):
    def __init__(self, dim: int, fn: nn.Module, context: int | None = None) -> None:
        super().__init__()
        self.fn, self.norm = fn, nn.LayerNorm(dim)
        self.norm_context = nn.LayerNorm(context) if context else None

    def forward(self, x: Tensor, **kwargs: Tensor) -> Tensor:
        if self.norm_context is not None:
            kwargs["context"] = self.norm_context(kwargs["context"])
        return self.fn(self.norm(x), **kwargs)


class CrossAttention(nn.Module):
    def __init__(self, dim: int, context: int, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(context, 2 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q = self.to_q(x)
        k, v = self.to_kv(context).chunk(2, dim=-1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        weights = (torch.einsum("bhid,bhjd->bhij", q, k) * self.scale).softmax(dim=-1)
        out = torch.einsum("bhij,bhjd->bhid", weights, v)
        return self.to_out(out.transpose(1, 2).flatten(2))


class GatedLinear(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, 12), nn.Linear(6, dim)

    def forward(self, x: Tensor) -> Tensor:
        x, gates = self.up(x).chunk(2, dim=-1)
        return self.down(x * F.gelu(gates))


class Perceiver(nn.Module):
    """Learned latents look at a long input, twice with the same weights."""

    def __init__(self, width: int = 8, channels: int = 5) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(4, width))
        self.cross = PreNorm(width, CrossAttention(width, channels), context=channels)
        self.ff = PreNorm(width, GatedLinear(width))
        self.to_logits = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3))

    def forward(self, data: Tensor) -> Tensor:
        x = self.latents.unsqueeze(0).expand(data.shape[0], -1, -1)
        for _ in range(2):
            x = self.cross(x, context=data) + x
            x = self.ff(x) + x
        return self.to_logits(x.mean(dim=1))


def _ids_and_mask() -> tuple[Tensor, Tensor]:
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[0, 4:], mask[2, 2:] = 0, 0
    return (1 + tokens(3, 6, among=13)) * mask, mask


CASES = (
    Case(
        "BERT, class token",
        lambda: Bert("first", "least"),
        lambda: call(_ids_and_mask()[0], attention_mask=_ids_and_mask()[1]),
        symmetries=(*_BERT, trade("layer.0.norm2.*", "pooler.weight")),
        inert=("layer.0.key.bias",),
    ),
    Case(
        "BERT, mean of what is not padding",
        lambda: Bert("mean", "billion"),
        lambda: call(*_ids_and_mask(), tokens(3, 6, among=2)),
        symmetries=(*_BERT, trade("layer.0.norm2.*", "classifier.weight")),
        inert=("layer.0.key.bias", "pooler.weight", "pooler.bias"),
        mode="train",
        note="the pooler belongs to the other way to pool and is not called",
    ),
    Case(
        "T5 encoder, tied",
        T5Encoder,
        lambda: call(tokens(2, 6, among=12)),
        symmetries=(
            trade(
                "shared.weight block.0.attention.o.weight block.1.attention.o.weight "
                "block.0.wo.weight block.1.wo.weight",
                "final.weight",
            ),
            *_t5_block(0),
            *_t5_block(1),
        ),
        note="scores are compared with the biases of relative positions, which stay",
    ),
    Case(
        "vision transformer",
        ViT,
        lambda: call(torch.randn(2, 3, 8, 8)),
        symmetries=_VIT,
        inert=("mask_token",),
    ),
    Case(
        "vision transformer, masked",
        ViT,
        lambda: call(torch.randn(2, 3, 8, 8), torch.tensor([[True, False, True, False]] * 2)),
        symmetries=({**_VIT[0], "mask_token": 1}, *_VIT[1:]),
    ),
    Case(
        "pictures and captions",
        TwoTowers,
        lambda: call(torch.randn(3, 3, 6, 6), tokens(3, 7, among=16)),
        symmetries=(
            trade("visual.0.*"),
            trade("image_projection.weight"),
            trade("token_embedding.weight positional_embedding"),
            trade("ln_final.*"),
            trade("text_projection"),
        ),
        spheres=("image_projection.weight", "text_projection"),
        granularity={"image_projection.weight": "whole tensor", "text_projection": "whole tensor"},
        mode="train",
    ),
    Case(
        "perceiver",
        Perceiver,
        lambda: call(torch.randn(2, 6, 5)),
        symmetries=(
            trade("latents cross.fn.to_out.* ff.fn.down.*"),
            trade("cross.norm.*", "cross.fn.to_q.weight"),
            trade("cross.norm_context.*", "cross.fn.to_kv.weight"),
            trade("cross.fn.to_q.weight cross.fn.to_out.weight", "cross.fn.to_kv.weight"),
            trade("ff.norm.*", "ff.fn.up.weight"),
            trade("to_logits.0.weight to_logits.0.bias", "to_logits.1.weight"),
        ),
        note="keys and values are one matrix: what it takes from queries the way out gives back",
    ),
)
