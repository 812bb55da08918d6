"""Small transformers in the style of popular repositories: GPT, Llama, BERT, T5 and the like."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from symmetry.tutorials.case import Case, call, tokens, trade


@dataclass
class Config:
    vocab_size: int = 11
    block_size: int = 8
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 8
    dropout: float = 0.0
    bias: bool = True
    tied: bool = False


class CausalSelfAttention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.attn_dropout = nn.Dropout(config.dropout)
        self.n_head, self.n_embd = config.n_head, config.n_embd
        size = config.block_size
        mask = torch.tril(torch.ones(size, size)).view(1, 1, size, size)
        self.register_buffer("bias", mask)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        att = self.attn_dropout(F.softmax(att, dim=-1))
        y = (att @ v).transpose(1, 2).contiguous().view(B, T, C)
        return self.c_proj(y)


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = nn.ModuleDict({
            "c_fc": nn.Linear(config.n_embd, 2 * config.n_embd, bias=config.bias),
            "c_proj": nn.Linear(2 * config.n_embd, config.n_embd, bias=config.bias),
        })  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class GPT(nn.Module):
    """A decoder; gives logits, and the loss when targets are given."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "wpe": nn.Embedding(config.block_size, config.n_embd),
            "drop": nn.Dropout(config.dropout),
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            "ln_f": nn.LayerNorm(config.n_embd),
        })  # fmt: skip
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.transformer["wte"].weight = self.lm_head.weight
        self.apply(self._init)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))

    def _init(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        _, t = idx.size()
        assert t <= self.config.block_size
        parts = self.transformer
        pos = torch.arange(0, t, dtype=torch.long, device=idx.device).unsqueeze(0)
        x = parts["drop"](parts["wte"](idx) + parts["wpe"](pos))
        for block in parts["h"]:
            x = block(x)
        logits = self.lm_head(parts["ln_f"](x))
        loss = None
        if targets is not None:
            loss = F.cross_entropy(
                logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1
            )
        return logits, loss


def gpt(**settings: object) -> GPT:
    return GPT(Config(**settings))  # type: ignore[arg-type]


def _gpt_symmetries(*, tied: bool) -> tuple[dict[str, int], ...]:
    stream = ["transformer.wpe.weight"]
    found = []
    for i in range(2):
        h = f"transformer.h.{i}."
        stream += [f"{h}attn.c_proj.*", f"{h}mlp.c_proj.*"]
        found += [
            trade(f"{h}ln_1.*", f"{h}attn.c_attn.weight"),
            trade(f"{h}ln_2.*", f"{h}mlp.c_fc.weight"),
        ]
    if tied:
        joint = trade(" ".join([*stream, "lm_head.weight"]), "transformer.ln_f.*")
        return (_renamed(joint), *found)
    return (
        trade(" ".join([*stream, "transformer.wte.weight"])),
        trade("transformer.ln_f.*", "lm_head.weight"),
        *found,
    )


def _renamed(v: dict[str, int]) -> dict[str, int]:
    """A tied weight goes by the name under which it comes first."""
    return {n.replace("lm_head", "transformer.wte"): e for n, e in v.items()}


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def _norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        return self._norm(x.float()).type_as(x) * self.weight


def rotations(dim: int, end: int, theta: float = 10000.0) -> Tensor:
    rates = 1.0 / (theta ** (torch.arange(0, dim, 2)[: dim // 2].float() / dim))
    angles = torch.outer(torch.arange(end), rates).float()
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, freqs: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    freqs = freqs.view(1, pairs.shape[1], 1, pairs.shape[3])
    return torch.view_as_real(pairs * freqs).flatten(3).type_as(x)


class CachedAttention(nn.Module):
    """Grouped queries, and a cache of plain tensors that is written in place."""

    def __init__(self, dim: int, n_heads: int, n_kv_heads: int, longest: int, batch: int) -> None:
        super().__init__()
        self.n_heads, self.n_kv, self.head_dim = n_heads, n_kv_heads, dim // n_heads
        self.wq = nn.Linear(dim, n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(n_heads * self.head_dim, dim, bias=False)
        self.cache_k = torch.zeros(batch, longest, n_kv_heads, self.head_dim)
        self.cache_v = torch.zeros(batch, longest, n_kv_heads, self.head_dim)

    def forward(self, x: Tensor, start: int, freqs: Tensor, mask: Tensor | None) -> Tensor:
        b, t, _ = x.shape
        xq = rotate(self.wq(x).view(b, t, self.n_heads, self.head_dim), freqs)
        xk = rotate(self.wk(x).view(b, t, self.n_kv, self.head_dim), freqs)
        xv = self.wv(x).view(b, t, self.n_kv, self.head_dim)
        self.cache_k, self.cache_v = self.cache_k.to(xq), self.cache_v.to(xq)
        self.cache_k[:b, start : start + t] = xk
        self.cache_v[:b, start : start + t] = xv
        keys, values = self.cache_k[:b, : start + t], self.cache_v[:b, : start + t]
        times = self.n_heads // self.n_kv
        keys, values = (
            y[:, :, :, None, :]
            .expand(b, start + t, self.n_kv, times, self.head_dim)
            .reshape(b, start + t, self.n_heads, self.head_dim)
            .transpose(1, 2)
            for y in (keys, values)
        )
        scores = xq.transpose(1, 2) @ keys.transpose(2, 3) / math.sqrt(self.head_dim)
        if mask is not None:
            scores = scores + mask
        weights = F.softmax(scores.float(), dim=-1).type_as(xq)
        return self.wo((weights @ values).transpose(1, 2).contiguous().view(b, t, -1))


class GatedFeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class LlamaBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attention = CachedAttention(dim, 2, 1, 8, 2)
        self.feed_forward = GatedFeedForward(dim, 6)
        self.attention_norm, self.ffn_norm = RMSNorm(dim), RMSNorm(dim)

    def forward(self, x: Tensor, start: int, freqs: Tensor, mask: Tensor | None) -> Tensor:
        h = x + self.attention(self.attention_norm(x), start, freqs, mask)
        return h + self.feed_forward(self.ffn_norm(h))


class Llama(nn.Module):
    def __init__(self, dim: int = 8, layers: int = 1, words: int = 10) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(words, dim)
        self.layers = nn.ModuleList(LlamaBlock(dim) for _ in range(layers))
        self.norm = RMSNorm(dim)
        self.output = nn.Linear(dim, words, bias=False)
        self.freqs = rotations(dim // 2, 16)

    def forward(self, ids: Tensor, start: int = 0) -> Tensor:
        t = ids.shape[1]
        h = self.tok_embeddings(ids)
        freqs, mask = self.freqs[start : start + t], None
        if t > 1:
            mask = torch.full((t, t), float("-inf"), device=ids.device)
            mask = torch.triu(mask, diagonal=1)
            mask = torch.hstack([torch.zeros((t, start), device=ids.device), mask]).type_as(h)
        for layer in self.layers:
            h = layer(h, start, freqs, mask)
        return self.output(self.norm(h)).float()


class TwoCalls(nn.Module):
    """Reads a prompt, then one more token with the help of the cache."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Llama()

    def forward(self, ids: Tensor) -> Tensor:
        first = self.model(ids[:, :-1], 0)
        return torch.cat([first, self.model(ids[:, -1:], ids.shape[1] - 1)], dim=1)


class SmallStart(nn.Module):
    """Everything starts at 0.02, before norms of PyTorch's own with the eps they come with."""

    def __init__(self, width: int = 8, words: int = 9) -> None:
        super().__init__()
        self.embed, self.norm1, self.norm2 = (
            nn.Embedding(words, width),
            nn.RMSNorm(width),
            nn.RMSNorm(width),
        )
        self.feed_forward = GatedFeedForward(width, 6)
        self.head = nn.Linear(width, words, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, mean=0.0, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.feed_forward(self.norm1(x))
        return self.head(self.norm2(x))


def _llama_symmetries(layers: int, prefix: str = "") -> tuple[dict[str, int], ...]:
    stream, found = [f"{prefix}tok_embeddings.weight"], []
    for i in range(layers):
        a, f, layer = (f"{prefix}layers.{i}.{n}" for n in ("attention.", "feed_forward.", ""))
        stream += [f"{a}wo.weight", f"{f}w2.weight"]
        found += [
            trade(f"{a}wq.weight", f"{a}wk.weight"),
            trade(f"{a}wv.weight", f"{a}wo.weight"),
            trade(f"{f}w3.weight", f"{f}w2.weight"),
            trade(f"{layer}attention_norm.weight", f"{a}wq.weight {a}wk.weight {a}wv.weight"),
            trade(f"{layer}ffn_norm.weight", f"{f}w1.weight {f}w3.weight"),
        ]
    return (
        trade(" ".join(stream)),
        trade(f"{prefix}norm.weight", f"{prefix}output.weight"),
        *found,
    )


_GPT_NOTE = "whatever the ids: positions and words differ in general"

CASES = (
    Case(
        "GPT, dummy ids of zeros",
        gpt,
        lambda: call(torch.zeros(2, 6, dtype=torch.long)),
        symmetries=_gpt_symmetries(tied=False),
        rich=lambda: call(tokens(2, 6, among=11)),
        note=_GPT_NOTE,
    ),
    Case(
        "GPT, one token",
        gpt,
        lambda: call(torch.zeros(1, 1, dtype=torch.long)),
        symmetries=_gpt_symmetries(tied=False),
        limits=True,
        rich=lambda: call(tokens(2, 6, among=11)),
        note="with one token nothing is compared with anything: longer texts show more",
    ),
    Case(
        "GPT, tied, with dropout and loss",
        lambda: gpt(tied=True, dropout=0.1),
        lambda: call(tokens(2, 7, among=11), tokens(2, 7, among=11)),
        symmetries=_gpt_symmetries(tied=True),
        mode="train",
    ),
    Case(
        "Llama with a cache",
        Llama,
        lambda: call(tokens(2, 5, among=10)),
        symmetries=_llama_symmetries(1),
    ),
    Case(
        "Llama, a prompt and one more token",
        TwoCalls,
        lambda: call(tokens(2, 5, among=10)),
        symmetries=_llama_symmetries(1, "model."),
    ),
    Case(
        "small start before nn.RMSNorm",
        SmallStart,
        lambda: call(tokens(2, 5, among=9)),
        symmetries=(
            trade("embed.weight feed_forward.w2.weight"),
            trade("feed_forward.w3.weight", "feed_forward.w2.weight"),
            trade("norm1.weight", "feed_forward.w1.weight feed_forward.w3.weight"),
            trade("norm2.weight", "head.weight"),
        ),
        note="its eps is that of the dtype: 1e-7, and 2e-16 where one computes in float64",
    ),
)
