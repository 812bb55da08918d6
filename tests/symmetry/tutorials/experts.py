"""Experts and routers; windows that shift; attention with normalized queries and keys."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from symmetry.tutorials.case import Case, call, tokens, trade


class Expert(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class SparseMoE(nn.Module):
    """The two best experts for every token; each expert is called on the tokens that chose it."""

    def __init__(self, width: int, experts: int, top_k: int = 2) -> None:
        super().__init__()
        self.top_k, self.n = top_k, experts
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(Expert(width, 5) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.view(-1, shape[-1])
        weights = F.softmax(self.gate(x), dim=1, dtype=torch.float)
        weights, selected = torch.topk(weights, self.top_k, dim=-1)
        weights /= weights.sum(dim=-1, keepdim=True)
        weights = weights.to(x.dtype)
        final = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        mask = F.one_hot(selected, num_classes=self.n).permute(2, 1, 0)
        for i, expert in enumerate(self.experts):
            idx, top_x = torch.where(mask[i])
            if top_x.shape[0] == 0:
                continue
            current = expert(x[None, top_x].reshape(-1, shape[-1])) * weights[top_x, idx, None]
            final.index_add_(0, top_x, current.to(x.dtype))
        return final.reshape(shape)


class SwitchFeedForward(nn.Module):
    """One expert per token, with room for so many; who comes too late passes unchanged."""

    def __init__(self, width: int, experts: int, capacity_factor: float = 1.0) -> None:
        super().__init__()
        self.n, self.capacity_factor = experts, capacity_factor
        self.switch = nn.Linear(width, experts)
        self.up = nn.ModuleList(nn.Linear(width, 6) for _ in range(experts))
        self.down = nn.ModuleList(nn.Linear(6, width, bias=False) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.view(-1, shape[-1])
        prob, routes = torch.max(F.softmax(self.switch(x), dim=-1), dim=-1)
        indexes = [torch.eq(routes, i).nonzero(as_tuple=True)[0] for i in range(self.n)]
        capacity = int(self.capacity_factor * len(x) / self.n)
        final = x.new_zeros(x.shape)
        dropped = [index[capacity:] for index in indexes]
        for i, index in enumerate(indexes):
            index = index[:capacity]
            final[index, :] = self.down[i](F.relu(self.up[i](x[index, :])))
        late = torch.cat(dropped)
        final[late, :] = x[late, :]
        return (final * prob.view(-1, 1)).view(shape)


class SoftMoE(nn.Module):
    """Every slot is a mixture of all tokens; directions of slots are compared with tokens."""

    def __init__(self, width: int, experts: int = 2, slots: int = 2) -> None:
        super().__init__()
        self.phi = nn.Parameter(torch.randn(width, experts, slots) / math.sqrt(width))
        self.scale = nn.Parameter(torch.ones(()))
        self.w1 = nn.Parameter(torch.randn(experts, width, 5) * 0.5)
        self.w2 = nn.Parameter(torch.randn(experts, 5, width) * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        phi = self.scale * F.normalize(self.phi, dim=0)
        logits = torch.einsum("bmd,dnp->bmnp", F.normalize(x, dim=-1), phi)
        dispatch = logits.softmax(dim=1)
        combine = logits.flatten(2).softmax(dim=-1).view_as(logits)
        slots = torch.einsum("bmd,bmnp->bnpd", x, dispatch)
        hidden = F.relu(torch.einsum("bnpd,ndh->bnph", slots, self.w1))
        out = torch.einsum("bnph,nhd->bnpd", hidden, self.w2)
        return torch.einsum("bnpd,bmnp->bmd", out, combine)


class Routed(nn.Module):
    """Words, a norm, experts beside the stream, a head."""

    def __init__(self, experts: nn.Module, width: int = 6, words: int = 12) -> None:
        super().__init__()
        self.embed_tokens, self.norm1 = nn.Embedding(words, width), nn.RMSNorm(width)
        self.moe = experts
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, words, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        return self.head(self.norm(x + self.moe(self.norm1(x))))


class QKNorm(nn.Module):
    """Queries and keys are normalized per head, with gains shared by the heads."""

    def __init__(self, width: int = 8, heads: int = 2, words: int = 9) -> None:
        super().__init__()
        self.heads = heads
        self.embed_tokens, self.norm = nn.Embedding(words, width), nn.RMSNorm(width)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.q_norm, self.k_norm = nn.RMSNorm(width // heads), nn.RMSNorm(width // heads)
        self.lm_head = nn.Linear(width, words, bias=False)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        y = self.norm(x)
        q, k = self.split(self.q_proj(y)), self.split(self.k_proj(y))
        y = F.scaled_dot_product_attention(
            self.q_norm(q), self.k_norm(k), self.split(self.v_proj(y)), is_causal=True
        )
        return self.lm_head(x + self.o_proj(y.transpose(1, 2).flatten(2)))


class WindowAttention(nn.Module):
    """Cosine attention in windows, with biases that a small network makes from places."""

    def __init__(self, dim: int, window: int, heads: int) -> None:
        super().__init__()
        self.dim, self.window, self.heads = dim, window, heads
        self.logit_scale = nn.Parameter(torch.log(10 * torch.ones(heads, 1, 1)))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, heads, bias=False))
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)
        place = torch.stack(torch.meshgrid(*[torch.arange(window)] * 2, indexing="ij")).flatten(1)
        table = (place[:, :, None] - place[:, None, :]).permute(1, 2, 0).float()
        table = torch.sign(table) * torch.log2(table.abs() + 1.0)
        self.register_buffer("relative_coords_table", table, persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        B, N, C = x.shape
        k_bias = torch.zeros_like(self.v_bias, requires_grad=False)
        qkv = F.linear(x, self.qkv.weight, torch.cat((self.q_bias, k_bias, self.v_bias)))
        q, k, v = qkv.reshape(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attn = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        attn = attn * torch.clamp(self.logit_scale, max=math.log(1.0 / 0.01)).exp()
        attn = attn + 16 * torch.sigmoid(self.cpb_mlp(self.relative_coords_table)).permute(2, 0, 1)
        if mask is not None:
            windows = mask.shape[0]
            attn = attn.view(B // windows, windows, self.heads, N, N) + mask[:, None]
            attn = attn.view(-1, self.heads, N, N)
        x = (attn.softmax(dim=-1) @ v).transpose(1, 2).reshape(B, N, C)
        return self.proj(x)


def windows_of(x: Tensor, size: int) -> Tensor:
    B, H, W, C = x.shape
    x = x.view(B, H // size, size, W // size, size, C)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, size * size, C)


class ShiftedWindows(nn.Module):
    """A picture is rolled, cut into windows, and put together again; norms come after."""

    def __init__(self, dim: int = 6, side: int = 4, window: int = 2) -> None:
        super().__init__()
        self.side, self.window, self.shift = side, window, window // 2
        self.embed = nn.Conv2d(3, dim, 2, stride=2)
        self.attn = WindowAttention(dim, window, 2)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 8), nn.GELU(), nn.Linear(8, dim))
        self.head = nn.Linear(dim, 3)
        image, count = torch.zeros((1, side, side, 1)), 0
        cuts = (slice(0, -window), slice(-window, -self.shift), slice(-self.shift, None))
        for rows in cuts:
            for columns in cuts:
                image[:, rows, columns, :] = count
                count += 1
        parts = windows_of(image, window).squeeze(-1)
        mask = parts.unsqueeze(1) - parts.unsqueeze(2)
        mask = mask.masked_fill(mask != 0, -100.0).masked_fill(mask == 0, 0.0)
        self.register_buffer("attn_mask", mask, persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image).permute(0, 2, 3, 1)
        B, H, W, C = x.shape
        y = torch.roll(x, shifts=(-self.shift, -self.shift), dims=(1, 2))
        y = self.attn(windows_of(y, self.window), self.attn_mask)
        y = y.view(B, H // self.window, W // self.window, self.window, self.window, C)
        y = y.permute(0, 1, 3, 2, 4, 5).contiguous().view(B, H, W, C)
        x = x + self.norm1(torch.roll(y, shifts=(self.shift, self.shift), dims=(1, 2)))
        x = x + self.norm2(self.mlp(x))
        return self.head(x.mean(dim=(1, 2)))


def _routed(parts: str, *more: dict[str, int], down: str) -> tuple[dict[str, int], ...]:
    return (
        trade(f"embed_tokens.weight {down}"),
        trade("norm1.weight", parts),
        trade("norm.weight", "head.weight"),
        *more,
    )


def _mixtral(experts: int) -> tuple[dict[str, int], ...]:
    names = [f"moe.experts.{i}." for i in range(experts)]
    reads = " ".join(f"{n}w1.weight {n}w3.weight" for n in names)
    return _routed(
        f"moe.gate.weight {reads}",
        *(trade(f"{n}w3.weight", f"{n}w2.weight") for n in names),
        down=" ".join(f"{n}w2.weight" for n in names),
    )


_UNREACHED = tuple(f"moe.experts.{i}.{n}.weight" for i in (0, 1) for n in ("w1", "w2", "w3"))

CASES = (
    Case(
        "sparse experts",
        lambda: Routed(SparseMoE(6, 4)),
        lambda: call(tokens(3, 9, among=12)),
        symmetries=_mixtral(4),
    ),
    Case(
        "sparse experts, some of them not asked",
        lambda: Routed(SparseMoE(6, 4)),
        lambda: call(torch.tensor([[3]])),
        symmetries=_mixtral(4),
        limits=True,
        unreached=_UNREACHED,
        rich=lambda: call(tokens(3, 9, among=12)),
        note="one token asks two experts of four",
    ),
    Case(
        "sparse experts, one each",
        lambda: Routed(SparseMoE(6, 3, top_k=1)),
        lambda: call(tokens(3, 9, among=12)),
        symmetries=(*_mixtral(3), trade("moe.gate.weight")),
        spheres=("moe.gate.weight",),
        granularity={"moe.gate.weight": "whole tensor"},
        note="one weight, made to sum to 1, is 1: the router's direction decides, and no gradient",
    ),
    Case(
        "switch with capacity",
        lambda: Routed(SwitchFeedForward(6, 2)),
        lambda: call(tokens(3, 6, among=12)),
        symmetries=(
            trade(
                "embed_tokens.weight norm1.weight moe.up.0.bias moe.up.1.bias", "moe.switch.weight"
            ),
            trade("moe.up.0.*", "moe.down.0.weight"),
            trade("moe.up.1.*", "moe.down.1.weight"),
            trade("norm.weight", "head.weight"),
        ),
        note="tokens that come too late pass unchanged and tie the norm to the stream",
    ),
    Case(
        "soft experts",
        lambda: Routed(SoftMoE(6)),
        lambda: call(tokens(2, 5, among=12)),
        symmetries=_routed(
            "moe.w1",
            trade("moe.w1", "moe.w2"),
            trade("moe.phi"),
            down="moe.w2",
        ),
        spheres=("moe.phi",),
    ),
    Case(
        "queries and keys normalized per head",
        QKNorm,
        lambda: call(tokens(2, 5, among=9)),
        symmetries=(
            trade("embed_tokens.weight o_proj.weight", "lm_head.weight"),
            trade("norm.weight", "v_proj.weight"),
            trade("q_proj.weight"),
            trade("k_proj.weight"),
            trade("q_norm.weight", "k_norm.weight"),
            trade("v_proj.weight", "o_proj.weight"),
        ),
        spheres=("q_proj.weight", "k_proj.weight"),
        granularity=dict.fromkeys(("q_proj.weight", "k_proj.weight"), "per head"),
    ),
    Case(
        "shifted windows, cosine attention",
        ShiftedWindows,
        lambda: call(torch.randn(2, 3, 8, 8)),
        symmetries=(
            trade(
                "embed.* norm1.* norm2.weight norm2.bias",
                "attn.qkv.weight mlp.0.weight head.weight",
            ),
            trade("attn.qkv.weight attn.q_bias attn.v_bias attn.proj.bias"),
            trade("attn.proj.*"),
            trade("attn.cpb_mlp.0.weight attn.cpb_mlp.0.bias", "attn.cpb_mlp.2.weight"),
            trade("mlp.2.weight mlp.2.bias"),
        ),
        note="one matrix: queries and keys forget their scale, values hand it to what comes next",
    ),
)
