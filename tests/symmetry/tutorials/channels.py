"""Norms, gates and modulation of channels, many of them written out by hand."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from symmetry.tutorials.case import Case, call, chain, trade


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, reduction: int = 2) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // reduction, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(channels // reduction, channels, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        y = self.fc(self.avg_pool(x).view(b, c)).view(b, c, 1, 1)
        return x * y.expand_as(x)


class SENet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.se, self.head = SqueezeExcite(6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.se(F.relu(self.bn(self.conv(x))))
        return self.head(x.mean(dim=(2, 3)))


class Separable(nn.Module):
    """Depthwise, pointwise, and activations that are cut off at six."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU6(inplace=True),
            nn.Conv2d(4, 6, 1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU6(inplace=True),
        )
        self.classifier = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.layers(x).mean([2, 3]))


class GroupNormByHand(nn.Module):
    def __init__(self, channels: int, groups: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.groups, self.eps = groups, eps

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.size()
        x = x.view(n, self.groups, -1)
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True)
        x = (x - mean) / (var + self.eps).sqrt()
        return x.view(n, c, h, w) * self.weight + self.bias


class WSConv2d(nn.Conv2d):
    """Weight standardization, written out."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = w - w.mean(dim=(1, 2, 3), keepdim=True)
        std = w.view(w.size(0), -1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
        return F.conv2d(x, w / std.expand_as(w), self.bias, self.stride, self.padding)


class Grouped(nn.Module):
    def __init__(self, conv: type[nn.Conv2d]) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = conv(3, 6, 3), GroupNormByHand(6, 2), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.norm(self.conv(x))).amax(dim=(-2, -1)))


class StyleTransfer(nn.Module):
    """Adaptive instance normalization: the content, with the spread of the style."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 4, 1), nn.ReflectionPad2d((1, 1, 1, 1)), nn.Conv2d(4, 5, 3), nn.ReLU()
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(5, 4, 3, padding=1, padding_mode="reflect"), nn.ReLU(),
            nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(4, 3, 3, padding=1),
        )  # fmt: skip

    @staticmethod
    def spread(x: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
        n, c = x.shape[:2]
        var = x.view(n, c, -1).var(dim=2) + eps
        return x.view(n, c, -1).mean(dim=2).view(n, c, 1, 1), var.sqrt().view(n, c, 1, 1)

    def forward(self, content: Tensor, style: Tensor, alpha: float = 0.7) -> Tensor:
        c, s = self.encoder(content), self.encoder(style)
        (c_mean, c_std), (s_mean, s_std) = self.spread(c), self.spread(s)
        t = (c - c_mean.expand_as(c)) / c_std.expand_as(c) * s_std + s_mean
        return self.decoder(alpha * t + (1 - alpha) * c)


class FiLM(nn.Module):
    """A question scales and shifts the channels of a picture."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.question = nn.GRU(3, 5, batch_first=True)
        self.film = nn.Linear(5, 2 * channels)
        self.conv = nn.Conv2d(3, channels, 3)
        self.bn = nn.BatchNorm2d(channels, affine=False)
        self.fc = nn.Linear(channels, 4)

    def forward(self, image: Tensor, question: Tensor) -> Tensor:
        _, h = self.question(question)
        gamma, beta = self.film(h.squeeze(0)).chunk(2, dim=-1)
        x = self.bn(self.conv(image))
        x = F.relu(gamma[:, :, None, None] * x + beta[:, :, None, None])
        return self.fc(x.flatten(2).max(dim=-1).values)


def batch_norm(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    moving: tuple[Tensor, Tensor],
    training: bool,
    eps: float = 1e-5,
    momentum: float = 0.9,
) -> tuple[Tensor, Tensor, Tensor]:
    moving_mean, moving_var = moving
    if not training:
        x_hat = (x - moving_mean) / torch.sqrt(moving_var + eps)
    else:
        mean = x.mean(dim=(0, 2, 3), keepdim=True)
        var = ((x - mean) ** 2).mean(dim=(0, 2, 3), keepdim=True)
        x_hat = (x - mean) / torch.sqrt(var + eps)
        moving_mean = momentum * moving_mean + (1.0 - momentum) * mean.data
        moving_var = momentum * moving_var + (1.0 - momentum) * var.data
    return gamma * x_hat + beta, moving_mean, moving_var


class BatchNormByHand(nn.Module):
    """Running statistics as buffers, or as plain tensors; training by flag, or by autograd."""

    def __init__(self, width: int, buffers: bool) -> None:
        super().__init__()
        shape = (1, width, 1, 1)
        self.gamma, self.beta = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape))
        self.buffers_ = buffers
        if buffers:
            self.register_buffer("moving_mean", torch.zeros(shape))
            self.register_buffer("moving_var", torch.ones(shape))
        else:
            self.moving_mean, self.moving_var = torch.zeros(shape), torch.ones(shape)

    def forward(self, x: Tensor) -> Tensor:
        training = self.training if self.buffers_ else torch.is_grad_enabled()
        moving = (self.moving_mean, self.moving_var)
        y, self.moving_mean, self.moving_var = batch_norm(
            x, self.gamma, self.beta, moving, training
        )
        return y


class LeNetByHand(nn.Module):
    def __init__(self, buffers: bool) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 5, 3), BatchNormByHand(5, buffers)
        self.fc = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(F.relu(self.bn(self.conv(x))), 2)
        return self.fc(x.sum(dim=(2, 3)))


class Highway(nn.Module):
    """Gates decide how much of the input passes unchanged."""

    def __init__(self, width: int = 6, layers: int = 2) -> None:
        super().__init__()
        self.start = nn.Linear(4, width)
        self.nonlinear = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.gate = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.out = nn.Linear(width, 3)
        for g in self.gate:
            nn.init.constant_(g.bias, -1.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        for nonlinear, gate in zip(self.nonlinear, self.gate, strict=True):
            t = torch.sigmoid(gate(x))
            x = t * F.relu(nonlinear(x)) + (1.0 - t) * x
        return self.out(x)


_BY_HAND = {
    "symmetries": (trade("conv.weight"), trade("bn.gamma bn.beta", "fc.weight")),
    "spheres": ("conv.weight",),
    "inert": ("conv.bias",),
    "granularity": {"conv.weight": "per filter"},
    "mode": "train",
}

CASES = (
    Case(
        "squeeze and excitation",
        SENet,
        lambda: call(torch.randn(3, 3, 7, 7)),
        symmetries=(
            trade("conv.weight"),
            trade("bn.*", "se.fc.0.weight head.weight"),
            trade("se.fc.0.weight", "se.fc.2.weight"),
        ),
        spheres=("conv.weight",),
        granularity={"conv.weight": "per filter"},
        mode="train",
    ),
    Case(
        "depthwise separable, in training",
        Separable,
        lambda: call(torch.randn(3, 4, 5, 5)),
        symmetries=(trade("layers.0.weight"), trade("layers.3.weight")),
        spheres=("layers.0.weight", "layers.3.weight"),
        granularity=dict.fromkeys(("layers.0.weight", "layers.3.weight"), "per filter"),
        mode="train",
        note="six is a scale of its own",
    ),
    Case(
        "depthwise separable, running statistics",
        Separable,
        lambda: call(torch.randn(3, 4, 5, 5)),
        symmetries=tuple(
            v
            for i, bn in ((0, "layers.1."), (3, "layers.4."))
            for v in (
                {f"layers.{i}.weight": 1, f"{bn}running_mean": 1, f"{bn}running_var": 2},
                {f"{bn}weight": 1, f"{bn}running_var": 2},
            )
        ),
    ),
    Case(
        "GroupNorm by reshaping",
        lambda: Grouped(nn.Conv2d),
        lambda: call(torch.randn(2, 3, 5, 5)),
        symmetries=(trade("conv.*"), trade("norm.*", "fc.weight")),
    ),
    Case(
        "weight standardization",
        lambda: Grouped(WSConv2d),
        lambda: call(torch.randn(2, 3, 5, 5)),
        symmetries=(trade("conv.weight"), trade("norm.*", "fc.weight")),
        spheres=("conv.weight",),
        granularity={"conv.weight": "per filter"},
    ),
    Case(
        "style transfer",
        StyleTransfer,
        lambda: call(torch.randn(2, 3, 5, 5), torch.randn(2, 3, 5, 5)),
        symmetries=chain("encoder.0 encoder.2 decoder.0 decoder.3"),
    ),
    Case(
        "questions modulate pictures",
        FiLM,
        lambda: call(torch.randn(3, 3, 5, 5), torch.randn(3, 4, 3)),
        symmetries=(trade("conv.weight"), trade("film.*", "fc.weight")),
        spheres=("conv.weight",),
        inert=("conv.bias",),
        granularity={"conv.weight": "per filter"},
        mode="train",
    ),
    Case(
        "batch norm by hand, buffers",
        lambda: LeNetByHand(True),
        lambda: call(torch.randn(3, 1, 6, 6)),
        **_BY_HAND,
    ),
    Case(
        "batch norm by hand, training where gradients are",
        lambda: LeNetByHand(False),
        lambda: call(torch.randn(3, 1, 6, 6)),
        **_BY_HAND,
        note="whether autograd is on decides what runs: in training it is",
    ),
    Case(
        "batch norm by hand, running statistics",
        lambda: LeNetByHand(True),
        lambda: call(torch.randn(3, 1, 6, 6)),
        symmetries=(
            {"conv.weight": 1, "conv.bias": 1, "bn.moving_mean": 1, "bn.moving_var": 2},
            {"bn.gamma": 1, "bn.moving_var": 2},
            {"bn.beta": 1, "bn.moving_var": -2, "fc.weight": -1},
        ),
        spheres=(),
    ),
    Case(
        "highway",
        Highway,
        lambda: call(torch.randn(4, 4)),
        symmetries=(
            trade(
                "start.* nonlinear.0.bias nonlinear.1.bias",
                "gate.0.weight gate.1.weight out.weight",
            ),
        ),
    ),
)
