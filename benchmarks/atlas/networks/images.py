"""Networks of images."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.atlas.networks.inputs import Example, normal


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
    return _UNet(), (normal(2, 3, 16, 16),)


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
    return _DiffusionUNet(), (normal(2, 3, 16, 16), torch.tensor([10, 500]))


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
        self.position = nn.Parameter(0.02 * normal(1, 16, width))
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
    return _DiT(), (normal(2, 4, 8, 8), torch.tensor([1, 7]))


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
    return _ConvVAE(), (normal(4, 1, 16, 16), normal(4, 6))


def dcgan_generator() -> Example:
    layers: list[nn.Module] = []
    for planes_in, planes in ((16, 32), (32, 16), (16, 8)):
        stride, pad = (1, 0) if planes_in == 16 and planes == 32 else (2, 1)
        layers += [nn.ConvTranspose2d(planes_in, planes, 4, stride, pad, bias=False)]
        layers += [nn.BatchNorm2d(planes), nn.ReLU()]
    layers += [nn.ConvTranspose2d(8, 3, 4, 2, 1, bias=False), nn.Tanh()]
    return nn.Sequential(*layers), (normal(4, 16, 1, 1),)


def spectral_critic() -> Example:
    normed = nn.utils.parametrizations.spectral_norm
    return nn.Sequential(
        normed(nn.Conv2d(3, 8, 4, 2, 1)), nn.LeakyReLU(0.2),
        normed(nn.Conv2d(8, 16, 4, 2, 1)), nn.LeakyReLU(0.2),
        nn.Flatten(), normed(nn.Linear(256, 1)),
    ), (normal(4, 3, 16, 16),)  # fmt: skip


def dqn() -> Example:
    return nn.Sequential(
        nn.Conv2d(4, 8, 8, 4), nn.ReLU(), nn.Conv2d(8, 16, 4, 2), nn.ReLU(),
        nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4),
    ), (normal(2, 4, 28, 28),)  # fmt: skip
