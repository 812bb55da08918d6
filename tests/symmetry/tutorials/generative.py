"""Models that make things: adversarial networks, autoencoders, flows, diffusion, scenes."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from symmetry.tutorials.case import Case, call, tokens, trade


class Generator(nn.Module):
    def __init__(self, nz: int = 5, ngf: int = 4, nc: int = 3) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(nz, ngf * 2, 4, 1, 0, bias=False),
            nn.BatchNorm2d(ngf * 2),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf * 2, ngf, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ngf),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf, nc, 4, 2, 1, bias=False),
            nn.Tanh(),
        )
        self.apply(weights_init)

    def forward(self, z: Tensor) -> Tensor:
        return self.main(z)


class Discriminator(nn.Module):
    def __init__(self, ndf: int = 4, nc: int = 3) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(nc, ndf, 4, 2, 1, bias=False),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf, ndf * 2, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ndf * 2),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf * 2, 1, 4, 1, 0, bias=False),
            nn.Sigmoid(),
        )
        self.apply(weights_init)

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x).view(-1)


def weights_init(m: nn.Module) -> None:
    name = m.__class__.__name__
    if name.find("Conv") != -1:
        nn.init.normal_(m.weight.data, 0.0, 0.02)
    elif name.find("BatchNorm") != -1:
        nn.init.normal_(m.weight.data, 1.0, 0.02)
        nn.init.constant_(m.bias.data, 0)


class SpectralCritic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = spectral_norm(nn.Conv2d(3, 4, 3, stride=2))
        self.conv2 = spectral_norm(nn.Conv2d(4, 6, 3, bias=False))
        self.fc = spectral_norm(nn.Linear(6, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv1(x), 0.1)
        x = F.leaky_relu(self.conv2(x), 0.1)
        return self.fc(x.sum(dim=(2, 3)))


class ConditionalGenerator(nn.Module):
    """Noise, and a label made one-hot by scattering."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.classes = classes
        self.noise, self.label = nn.Linear(5, 6), nn.Linear(classes, 6, bias=False)
        self.norm, self.out = nn.LayerNorm(6), nn.Linear(6, 7)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        one_hot = torch.zeros(labels.size(0), self.classes)
        one_hot.scatter_(1, labels.unsqueeze(1), 1.0)
        h = F.leaky_relu(self.noise(z), 0.2) + self.label(one_hot)
        return torch.tanh(self.out(F.leaky_relu(self.norm(h), 0.2)))


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(9, 6)
        self.fc21, self.fc22 = nn.Linear(6, 3), nn.Linear(6, 3)
        self.fc3, self.fc4 = nn.Linear(3, 6), nn.Linear(6, 9)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h1 = F.relu(self.fc1(x))
        return self.fc21(h1), self.fc22(h1)

    def reparameterize(self, mu: Tensor, logvar: Tensor) -> Tensor:
        std = torch.exp(0.5 * logvar)
        eps = torch.randn_like(std)
        return mu + eps * std

    def decode(self, z: Tensor) -> Tensor:
        return torch.sigmoid(self.fc4(F.relu(self.fc3(z))))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu, logvar = self.encode(x.view(-1, 9))
        return self.decode(self.reparameterize(mu, logvar)), mu, logvar


class Autoencoder(nn.Module):
    """Denoising, tied: the way back is the transpose of the way in."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8) * 0.3)
        self.b_in, self.b_out = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        noisy = x + 0.1 * torch.randn_like(x)
        h = F.relu(F.linear(noisy, self.weight, self.b_in))
        return F.mse_loss(F.linear(h, self.weight.t(), self.b_out), x)


class VectorQuantizer(nn.Module):
    def __init__(self, codes: int, width: int, beta: float = 0.25) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, width)
        self.embedding.weight.data.uniform_(-1.0, 1.0)
        self.beta = beta

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat = z.reshape(-1, z.size(-1))
        d = (
            torch.sum(flat**2, dim=1, keepdim=True)
            + torch.sum(self.embedding.weight**2, dim=1)
            - 2 * torch.matmul(flat, self.embedding.weight.t())
        )
        indices = torch.argmin(d, dim=1).unsqueeze(1)
        one_hot = torch.zeros(indices.shape[0], self.embedding.num_embeddings)
        one_hot.scatter_(1, indices, 1)
        quantized = torch.matmul(one_hot.to(flat), self.embedding.weight).view(z.shape)
        loss = F.mse_loss(quantized.detach(), z) * self.beta + F.mse_loss(quantized, z.detach())
        quantized = z + (quantized - z).detach()
        return quantized, loss, indices


class VQVAE(nn.Module):
    """Gives the reconstruction alone, or with the loss of the codes."""

    def __init__(self, with_loss: bool) -> None:
        super().__init__()
        self.with_loss = with_loss
        self.encoder = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
        self.quantizer = VectorQuantizer(6, 3)
        self.decoder = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        quantized, loss, _ = self.quantizer(self.encoder(x))
        x = self.decoder(quantized)
        return (x, loss) if self.with_loss else x


class Coupling(nn.Module):
    """Half of the numbers say how to stretch and move the others."""

    def __init__(self, dim: int, flip: bool) -> None:
        super().__init__()
        self.flip, half = flip, dim // 2
        self.s = nn.Sequential(nn.Linear(half, 6), nn.LeakyReLU(), nn.Linear(6, half), nn.Tanh())
        self.t = nn.Sequential(nn.Linear(half, 6), nn.LeakyReLU(), nn.Linear(6, half))
        self.rescale = nn.Parameter(torch.ones(half))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, dim=1)
        if self.flip:
            a, b = b, a
        s = self.rescale * self.s(a)
        b = b * torch.exp(s) + self.t(a)
        return torch.cat([b, a] if self.flip else [a, b], dim=1), s.sum(dim=1)


class Flow(nn.Module):
    def __init__(self, dim: int = 4) -> None:
        super().__init__()
        self.loc, self.scale = nn.Parameter(torch.zeros(1, dim)), nn.Parameter(torch.ones(1, dim))
        self.layers = nn.ModuleList(Coupling(dim, bool(i)) for i in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.scale * (x + self.loc)
        log_det = torch.log(torch.abs(self.scale)).sum().expand(len(x))
        for layer in self.layers:
            x, more = layer(x)
            log_det = log_det + more
        return -0.5 * (x**2 + math.log(2 * math.pi)).sum(dim=1) + log_det


def time_embedding(t: Tensor, dim: int) -> Tensor:
    rates = torch.exp(-math.log(10000) * torch.arange(dim // 2, dtype=torch.float32) / (dim // 2))
    args = t[:, None].float() * rates[None]
    return torch.cat([torch.cos(args), torch.sin(args)], dim=-1)


class ResBlock(nn.Module):
    """The time is added between two normalizations."""

    def __init__(self, channels: int, time: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(2, channels), nn.GroupNorm(2, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time, channels)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]
        return x + self.conv2(F.silu(self.norm2(h)))


class Denoiser(nn.Module):
    def __init__(self, channels: int = 6, time: int = 8) -> None:
        super().__init__()
        self.time = time
        self.time_mlp = nn.Sequential(nn.Linear(time, time), nn.SiLU(), nn.Linear(time, time))
        self.conv_in = nn.Conv2d(2, channels, 3, padding=1)
        self.block = ResBlock(channels, time)
        self.norm_out = nn.GroupNorm(3, channels)
        self.conv_out = nn.Conv2d(channels, 2, 3, padding=1)
        betas = torch.linspace(1e-4, 0.3, 10)
        alphas = torch.cumprod(1.0 - betas, dim=0)
        self.register_buffer("alphas_cumprod", alphas, persistent=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        noise = torch.randn_like(x)
        a = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        noisy = a.sqrt() * x + (1 - a).sqrt() * noise
        emb = self.time_mlp(time_embedding(t, self.time))
        h = self.block(self.conv_in(noisy), emb)
        return F.mse_loss(self.conv_out(F.silu(self.norm_out(h))), noise)


class NeRF(nn.Module):
    """Density and color along rays, from sines and cosines of places, composed to pixels."""

    def __init__(self, width: int = 8, frequencies: int = 2) -> None:
        super().__init__()
        self.frequencies = frequencies
        points = 3 * (1 + 2 * frequencies)
        self.pts_linears = nn.ModuleList([
            nn.Linear(points, width), nn.Linear(width, width), nn.Linear(width + points, width)
        ])  # fmt: skip
        self.alpha_linear, self.feature_linear = nn.Linear(width, 1), nn.Linear(width, width)
        self.views_linear, self.rgb_linear = nn.Linear(width + 3, 6), nn.Linear(6, 3)

    def encode(self, x: Tensor) -> Tensor:
        out = [x]
        for i in range(self.frequencies):
            out += [fn(2.0**i * x) for fn in (torch.sin, torch.cos)]
        return torch.cat(out, -1)

    def forward(self, points: Tensor, views: Tensor, z_vals: Tensor) -> tuple[Tensor, Tensor]:
        encoded = self.encode(points)
        h = encoded
        for i, layer in enumerate(self.pts_linears):
            h = F.relu(layer(h))
            if i == 1:
                h = torch.cat([encoded, h], -1)
        sigma = F.relu(self.alpha_linear(h)[..., 0])
        seen = torch.cat([self.feature_linear(h), views[:, None].expand(*h.shape[:2], 3)], -1)
        rgb = torch.sigmoid(self.rgb_linear(F.relu(self.views_linear(seen))))
        dists = z_vals[..., 1:] - z_vals[..., :-1]
        dists = torch.cat([dists, torch.tensor([1e10]).expand(dists[..., :1].shape)], -1)
        alpha = 1.0 - torch.exp(-sigma * dists)
        free = torch.cat([torch.ones((alpha.shape[0], 1)), 1.0 - alpha + 1e-10], -1)
        weights = alpha * torch.cumprod(free, -1)[:, :-1]
        return torch.sum(weights[..., None] * rgb, -2), torch.sum(weights * z_vals, -1)


_GENERATOR = ("main.0.weight", "main.3.weight")

CASES = (
    Case(
        "DCGAN generator",
        Generator,
        lambda: call(torch.randn(3, 5, 1, 1)),
        symmetries=(
            *(trade(n) for n in _GENERATOR),
            trade("main.1.*"),
            trade("main.4.*", "main.6.weight"),
        ),
        spheres=_GENERATOR,
        granularity=dict.fromkeys(_GENERATOR, "per filter"),
        mode="train",
        note="the filters of a transposed convolution lie along its second axis",
    ),
    Case(
        "DCGAN discriminator",
        Discriminator,
        lambda: call(torch.randn(3, 3, 16, 16)),
        symmetries=(
            trade("main.0.weight"),
            trade("main.2.weight"),
            trade("main.3.*", "main.5.weight"),
        ),
        spheres=("main.0.weight", "main.2.weight"),
        granularity={"main.0.weight": "whole tensor", "main.2.weight": "per filter"},
        mode="train",
    ),
    Case(
        "spectral critic",
        SpectralCritic,
        lambda: call(torch.randn(3, 3, 8, 8)),
        symmetries=tuple(
            trade(f"{n}.parametrizations.weight.original") for n in ("conv1", "conv2", "fc")
        ),
        spheres=tuple(f"{n}.parametrizations.weight.original" for n in ("conv1", "conv2", "fc")),
        granularity={"conv1.parametrizations.weight.original": "whole tensor"},
        mode="train",
    ),
    Case(
        "conditional generator",
        ConditionalGenerator,
        lambda: call(torch.randn(6, 5), tokens(6, among=4)),
        symmetries=(trade("noise.* label.weight"), trade("norm.*", "out.weight")),
    ),
    Case(
        "variational autoencoder",
        VAE,
        lambda: call(torch.rand(4, 1, 3, 3)),
        symmetries=(trade("fc1.*", "fc21.weight fc22.weight"), trade("fc3.*", "fc4.weight")),
        mode="train",
    ),
    Case(
        "denoising autoencoder, tied",
        Autoencoder,
        lambda: call(torch.randn(5, 8)),
        mode="train",
        note="the same weight on both ways: it cannot trade with itself",
    ),
    Case(
        "vector quantization",
        lambda: VQVAE(False),
        lambda: call(torch.randn(12, 5)),
        symmetries=(
            trade("encoder.0.*", "encoder.2.weight"),
            trade("encoder.2.* quantizer.embedding.weight", "decoder.0.weight"),
            trade("decoder.0.*", "decoder.2.weight"),
        ),
        mode="train",
        jumps=True,
        note="the nearest code stays the nearest where all grow together",
    ),
    Case(
        "vector quantization with its loss",
        lambda: VQVAE(True),
        lambda: call(torch.randn(12, 5)),
        symmetries=(
            trade("encoder.0.*", "encoder.2.weight"),
            trade("decoder.0.*", "decoder.2.weight"),
        ),
        mode="train",
    ),
    Case(
        "real-valued flow",
        Flow,
        lambda: call(torch.randn(5, 4)),
        symmetries=tuple(
            trade(f"layers.{i}.{n}.0.*", f"layers.{i}.{n}.2.weight")
            for i in range(2)
            for n in ("s", "t")
        ),
    ),
    Case(
        "diffusion",
        Denoiser,
        lambda: call(torch.randn(3, 2, 5, 5), torch.tensor([1, 4, 8])),
        symmetries=(
            trade("conv_in.* block.conv2.*"),
            trade("block.conv1.* block.time_emb_proj.*"),
        ),
        mode="train",
    ),
    Case(
        "radiance field",
        NeRF,
        lambda: call(
            torch.randn(3, 4, 3), torch.randn(3, 3), torch.rand(3, 4).cumsum(-1)
        ),
        symmetries=(
            trade("pts_linears.0.*", "pts_linears.1.weight"),
            trade("pts_linears.2.*", "alpha_linear.weight feature_linear.weight"),
            trade("views_linear.*", "rgb_linear.weight"),
        ),
    ),
)  # fmt: skip
