"""Networks that people write themselves, in plain PyTorch: ``onsphere audit`` takes them by name.

Each function takes nothing and returns a module and its inputs.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Example = tuple[nn.Module, tuple[Tensor, ...]]


def _tokens(batch: int = 2, length: int = 12, vocabulary: int = 64) -> Tensor:
    return torch.randint(0, vocabulary, (batch, length), generator=_generator())


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_generator())


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


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
    return _SmallGPT(), (_tokens(),)


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
    return _SpeedrunGPT(), (_tokens(),)


class _Recurrent(nn.Module):
    def __init__(self, cell: type[nn.RNNBase], vocabulary: int = 64, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.cell = cell(width, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.cell(self.embed(ids))[0])


def lstm() -> Example:
    return _Recurrent(nn.LSTM), (_tokens(),)


def gru() -> Example:
    return _Recurrent(nn.GRU), (_tokens(),)


class _TimedBlock(nn.Module):
    """A residual block of a diffusion network: GroupNorm, SiLU, the time as a scale and a shift."""

    def __init__(self, planes_in: int, planes: int, time: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, planes_in), nn.GroupNorm(4, planes)
        self.conv1 = nn.Conv2d(planes_in, planes, 3, padding=1)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1)
        self.time = nn.Linear(time, 2 * planes)
        self.skip = nn.Conv2d(planes_in, planes, 1) if planes_in != planes else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.time(F.silu(time))[:, :, None, None].chunk(2, dim=1)
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.norm2(y) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(y))


class _DiffusionUNet(nn.Module):
    def __init__(self, planes: int = 16, time: int = 32) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, time), nn.SiLU(), nn.Linear(time, time))
        self.enter = nn.Conv2d(3, planes, 3, padding=1)
        self.down1 = _TimedBlock(planes, planes, time)
        self.down2 = _TimedBlock(planes, 2 * planes, time)
        self.middle = _TimedBlock(2 * planes, 2 * planes, time)
        self.up2 = _TimedBlock(4 * planes, planes, time)
        self.up1 = _TimedBlock(2 * planes, planes, time)
        self.norm, self.leave = nn.GroupNorm(4, planes), nn.Conv2d(planes, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        rates = torch.exp(-math.log(1e4) * torch.arange(8) / 8)
        angles = t[:, None].float() * rates
        time = self.time(torch.cat([angles.sin(), angles.cos()], dim=-1))
        one = self.down1(self.enter(x), time)
        two = self.down2(F.avg_pool2d(one, 2), time)
        y = self.middle(F.avg_pool2d(two, 2), time)
        y = self.up2(torch.cat([F.interpolate(y, scale_factor=2.0), two], dim=1), time)
        y = self.up1(torch.cat([F.interpolate(y, scale_factor=2.0), one], dim=1), time)
        return self.leave(F.silu(self.norm(y)))


def diffusion_unet() -> Example:
    return _DiffusionUNet(), (_normal(2, 3, 16, 16), torch.tensor([10, 500]))


class _DiTBlock(nn.Module):
    """A diffusion transformer's block: norms without gains, adaptive scales, shifts and gates."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )
        self.adapt = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adapt(F.silu(c))[:, None].chunk(6, -1)
        y = F.layer_norm(x, x.shape[-1:]) * (1 + scale1) + shift1
        x = x + gate1 * self.attention(y, y, y, need_weights=False)[0]
        y = F.layer_norm(x, x.shape[-1:]) * (1 + scale2) + shift2
        return x + gate2 * self.mlp(y)


class _DiT(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patch = nn.Conv2d(4, width, 2, 2)
        self.position = nn.Parameter(0.02 * _normal(1, 16, width))
        self.label = nn.Embedding(10, width)
        self.blocks = nn.ModuleList(_DiTBlock(width, 4) for _ in range(2))
        self.adapt, self.out = nn.Linear(width, 2 * width), nn.Linear(width, 16)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        c = self.label(label)
        y = self.patch(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            y = block(y, c)
        shift, scale = self.adapt(F.silu(c))[:, None].chunk(2, dim=-1)
        return self.out(F.layer_norm(y, y.shape[-1:]) * (1 + scale) + shift)


def dit() -> Example:
    return _DiT(), (_normal(2, 4, 8, 8), torch.tensor([1, 7]))


class _DoubleConv(nn.Sequential):
    def __init__(self, planes_in: int, planes: int) -> None:
        super().__init__(
            nn.Conv2d(planes_in, planes, 3, padding=1, bias=False), nn.BatchNorm2d(planes),
            nn.ReLU(), nn.Conv2d(planes, planes, 3, padding=1, bias=False),
            nn.BatchNorm2d(planes), nn.ReLU(),
        )  # fmt: skip


class _UNet(nn.Module):
    def __init__(self, planes: int = 8) -> None:
        super().__init__()
        self.down1, self.down2 = _DoubleConv(3, planes), _DoubleConv(planes, 2 * planes)
        self.middle = _DoubleConv(2 * planes, 4 * planes)
        self.up2 = nn.ConvTranspose2d(4 * planes, 2 * planes, 2, 2)
        self.merge2 = _DoubleConv(4 * planes, 2 * planes)
        self.up1 = nn.ConvTranspose2d(2 * planes, planes, 2, 2)
        self.merge1 = _DoubleConv(2 * planes, planes)
        self.out = nn.Conv2d(planes, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        y = self.middle(F.max_pool2d(two, 2))
        y = self.merge2(torch.cat([two, self.up2(y)], dim=1))
        return self.out(self.merge1(torch.cat([one, self.up1(y)], dim=1)))


def unet() -> Example:
    return _UNet(), (_normal(2, 3, 16, 16),)


class _GraphConv(nn.Module):
    """Graph convolution: every node adds what its neighbours send, in the symmetric norm."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width_in, width)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        degree = torch.ones(len(x)).index_add(0, target, torch.ones(len(target)))
        sent = self.linear(x) / degree.sqrt()[:, None]
        return torch.index_add(sent, 0, target, sent[source]) / degree.sqrt()[:, None]


class _GCN(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.conv1, self.norm1 = _GraphConv(16, width), nn.BatchNorm1d(width)
        self.conv2, self.norm2 = _GraphConv(width, width), nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x, edges)))
        return self.head(F.relu(self.norm2(self.conv2(y, edges))))


def _graph(nodes: int = 20, links: int = 60) -> tuple[Tensor, Tensor]:
    return _normal(nodes, 16), torch.randint(0, nodes, (2, links), generator=_generator())


def gcn() -> Example:
    return _GCN(), _graph()


class _GAT(nn.Module):
    """Graph attention: a softmax over the edges that end at a node."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(16, width, bias=False)
        self.source = nn.Parameter(_normal(heads, width // heads))
        self.target = nn.Parameter(_normal(heads, width // heads).flip(0))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        y = self.linear(x).unflatten(-1, self.source.shape)
        score = (y * self.source).sum(-1)[source] + (y * self.target).sum(-1)[target]
        weight = F.leaky_relu(score, 0.2).exp()
        total = torch.zeros(len(x), weight.shape[1]).index_add(0, target, weight)
        share = weight / (total[target] + 1e-16)
        sent = torch.zeros_like(y).index_add(0, target, share[..., None] * y[source])
        return self.head(F.elu(sent.flatten(1)))


def gat() -> Example:
    return _GAT(), _graph()


class _DLRM(nn.Module):
    """A recommender: embeddings of categories, a perceptron of numbers, and all their products."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(50, width, mode="sum") for _ in range(3))
        self.bottom = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, width), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(width + 6, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        x = self.bottom(numbers)
        found = [table(c[:, None]) for table, c in zip(self.tables, categories, strict=True)]
        each = torch.stack([x, *found], dim=1)
        products = each @ each.transpose(1, 2)
        row, column = torch.tril_indices(4, 4, offset=-1)
        return self.top(torch.cat([x, products[:, row, column]], dim=1))


def dlrm() -> Example:
    categories = torch.randint(0, 50, (3, 8), generator=_generator())
    return _DLRM(), (_normal(8, 8), categories)


class _NeRF(nn.Module):
    """A radiance field: sines of a position, a perceptron with a skip, density and colour."""

    def __init__(self, width: int = 48, bands: int = 4) -> None:
        super().__init__()
        self.bands, entering = bands, 3 + 6 * bands
        self.first = nn.Sequential(
            nn.Linear(entering, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.second = nn.Sequential(nn.Linear(width + entering, width), nn.ReLU())
        self.density, self.feature = nn.Linear(width, 1), nn.Linear(width, width)
        self.colour = nn.Sequential(nn.Linear(width + 3, width), nn.ReLU(), nn.Linear(width, 3))

    def forward(self, position: Tensor, direction: Tensor) -> Tensor:
        waves = [f(2.0**k * position) for k in range(self.bands) for f in (torch.sin, torch.cos)]
        x = torch.cat([position, *waves], dim=-1)
        y = self.second(torch.cat([self.first(x), x], dim=-1))
        seen = torch.cat([self.feature(y), direction], dim=-1)
        return torch.cat([self.colour(seen).sigmoid(), F.relu(self.density(y))], dim=-1)


def nerf() -> Example:
    return _NeRF(), (_normal(16, 3), F.normalize(_normal(16, 3).flip(0), dim=-1))


class _Siren(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, width), nn.Linear(width, width)])
        self.out = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.sin(30 * layer(x))
        return self.out(x)


def siren() -> Example:
    return _Siren(), (_normal(16, 2),)


class _ConvVAE(nn.Module):
    """A variational autoencoder of images; the noise is given, as a run of it draws it."""

    def __init__(self, planes: int = 8, latent: int = 6) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, planes, 4, 2, 1), nn.BatchNorm2d(planes), nn.ReLU(),
            nn.Conv2d(planes, 2 * planes, 4, 2, 1), nn.BatchNorm2d(2 * planes), nn.ReLU(),
            nn.Flatten(),
        )  # fmt: skip
        self.mean, self.spread = (nn.Linear(32 * planes, latent) for _ in range(2))
        self.decoder = nn.Sequential(
            nn.Linear(latent, 32 * planes), nn.Unflatten(1, (2 * planes, 4, 4)),
            nn.ConvTranspose2d(2 * planes, planes, 4, 2, 1), nn.BatchNorm2d(planes), nn.ReLU(),
            nn.ConvTranspose2d(planes, 1, 4, 2, 1), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.encoder(x)
        mean, log_variance = self.mean(y), self.spread(y)
        return self.decoder(mean + noise * (0.5 * log_variance).exp()), mean, log_variance


def conv_vae() -> Example:
    return _ConvVAE(), (_normal(4, 1, 16, 16), _normal(4, 6))


def dcgan_generator() -> Example:
    layers: list[nn.Module] = []
    for planes_in, planes in ((16, 32), (32, 16), (16, 8)):
        stride, pad = (1, 0) if planes_in == 16 and planes == 32 else (2, 1)
        layers += [nn.ConvTranspose2d(planes_in, planes, 4, stride, pad, bias=False)]
        layers += [nn.BatchNorm2d(planes), nn.ReLU()]
    layers += [nn.ConvTranspose2d(8, 3, 4, 2, 1, bias=False), nn.Tanh()]
    return nn.Sequential(*layers), (_normal(4, 16, 1, 1),)


def spectral_critic() -> Example:
    normed = nn.utils.parametrizations.spectral_norm
    return nn.Sequential(
        normed(nn.Conv2d(3, 8, 4, 2, 1)), nn.LeakyReLU(0.2),
        normed(nn.Conv2d(8, 16, 4, 2, 1)), nn.LeakyReLU(0.2),
        nn.Flatten(), normed(nn.Linear(256, 1)),
    ), (_normal(4, 3, 16, 16),)  # fmt: skip


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
    ), (_normal(2, 1, 40),)  # fmt: skip


class _PointNet(nn.Module):
    """A network of point clouds: one perceptron for all points, then their maximum."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.points = nn.Sequential(
            nn.Conv1d(3, width, 1), nn.BatchNorm1d(width), nn.ReLU(),
            nn.Conv1d(width, 2 * width, 1), nn.BatchNorm1d(2 * width), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Sequential(
            nn.Linear(2 * width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 4)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.points(x).amax(dim=-1))


def pointnet() -> Example:
    return _PointNet(), (_normal(4, 3, 20),)


class _ActorCritic(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.policy, self.value = (
            nn.Sequential(
                nn.Linear(8, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(),
                nn.Linear(width, n),
            )
            for n in (3, 1)
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.policy(x).log_softmax(-1), self.value(x)


def actor_critic() -> Example:
    return _ActorCritic(), (_normal(8, 8),)


def dqn() -> Example:
    return nn.Sequential(
        nn.Conv2d(4, 8, 8, 4), nn.ReLU(), nn.Conv2d(8, 16, 4, 2), nn.ReLU(),
        nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4),
    ), (_normal(2, 4, 28, 28),)  # fmt: skip


class _TwoTowers(nn.Module):
    """A retrieval network: two encoders, unit vectors, a learned temperature."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.image = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
            nn.Linear(392, width, bias=False),
        )  # fmt: skip
        self.text = nn.EmbeddingBag(64, width, mode="mean")
        self.temperature = nn.Parameter(torch.tensor(2.0))

    def forward(self, image: Tensor, ids: Tensor) -> Tensor:
        one, two = F.normalize(self.image(image), dim=-1), F.normalize(self.text(ids), dim=-1)
        return self.temperature.exp() * one @ two.T


def two_towers() -> Example:
    return _TwoTowers(), (_normal(4, 3, 16, 16), _tokens(4))


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
    return _Encoder(), (_tokens(),)


def mlp() -> Example:
    return nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    ), (_normal(8, 16),)  # fmt: skip


ABOUT = {
    "nanogpt": "small GPT, LayerNorm, fused qkv, tied head",
    "speedrun_gpt": "GPT of speedruns: RMSNorm without gains, QK-norm, squared ReLU",
    "torch_transformer": "nn.TransformerEncoder, post-norm",
    "lstm": "language model with nn.LSTM",
    "gru": "language model with nn.GRU",
    "mlp": "perceptron with ReLU",
    "unet": "U-Net for masks, BatchNorm",
    "diffusion_unet": "U-Net for diffusion, GroupNorm, the time as scale and shift",
    "dit": "diffusion transformer, adaptive LayerNorm",
    "conv_vae": "variational autoencoder, BatchNorm",
    "dcgan_generator": "DCGAN's generator, BatchNorm",
    "spectral_critic": "critic with spectral norm",
    "wavenet": "gated convolutions over time, weight norm",
    "gcn": "graph convolution, BatchNorm and LayerNorm",
    "gat": "graph attention",
    "pointnet": "point clouds, BatchNorm",
    "dlrm": "recommender, embeddings and their products",
    "two_towers": "retrieval: unit vectors and a temperature",
    "nerf": "radiance field",
    "siren": "perceptron with sines",
    "actor_critic": "policy and value with tanh",
    "dqn": "Q-network of Atari games",
}
"""Each of them, in a few words."""
