"""Networks for images: classifiers, and what turns images into images."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from symmetry.tutorials.case import Case, Exponents, call, chain, trade


class Net(nn.Module):
    """The first convolutional network of everybody."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(4, 6, 5)
        self.fc1 = nn.Linear(6 * 2 * 2, 8)
        self.fc2 = nn.Linear(8, 6)
        self.fc3 = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


class Digits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3, 1), nn.Conv2d(4, 6, 3, 1)
        self.dropout1, self.dropout2 = nn.Dropout2d(0.25), nn.Dropout(0.5)
        self.fc1, self.fc2 = nn.Linear(6 * 4 * 4, 8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        x = self.dropout1(F.max_pool2d(x, 2))
        x = F.relu(self.fc1(torch.flatten(x, 1)))
        return F.log_softmax(self.fc2(self.dropout2(x)), dim=1)


class SpatialTransformer(nn.Module):
    """Looks where to look, and then looks there."""

    def __init__(self) -> None:
        super().__init__()
        self.localization = nn.Sequential(
            nn.Conv2d(1, 4, 5), nn.MaxPool2d(2, stride=2), nn.ReLU(True),
            nn.Conv2d(4, 5, 3), nn.MaxPool2d(2, stride=2), nn.ReLU(True),
        )  # fmt: skip
        self.fc_loc = nn.Sequential(nn.Linear(5 * 2 * 2, 6), nn.ReLU(True), nn.Linear(6, 3 * 2))
        self.fc_loc[2].weight.data.zero_()
        self.fc_loc[2].bias.data.copy_(torch.tensor([1, 0, 0, 0, 1, 0], dtype=torch.float))
        self.conv1, self.drop = nn.Conv2d(1, 4, 5), nn.Dropout2d()
        self.fc1, self.fc2 = nn.Linear(4 * 6 * 6, 6), nn.Linear(6, 4)

    def stn(self, x: Tensor) -> Tensor:
        xs = self.localization(x).view(-1, 5 * 2 * 2)
        theta = self.fc_loc(xs).view(-1, 2, 3)
        grid = F.affine_grid(theta, x.size(), align_corners=False)
        return F.grid_sample(x, grid, align_corners=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stn(x)
        x = F.relu(F.max_pool2d(self.drop(self.conv1(x)), 2))
        x = F.relu(self.fc1(x.view(-1, 4 * 6 * 6)))
        x = F.dropout(x, training=self.training)
        return F.log_softmax(self.fc2(x), dim=1)


class SuperResolution(nn.Module):
    def __init__(self, upscale_factor: int = 2) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(1, 6, (5, 5), (1, 1), (2, 2))
        self.conv2 = nn.Conv2d(6, 6, (3, 3), (1, 1), (1, 1))
        self.conv3 = nn.Conv2d(6, 4, (3, 3), (1, 1), (1, 1))
        self.conv4 = nn.Conv2d(4, upscale_factor**2, (3, 3), (1, 1), (1, 1))
        self.pixel_shuffle = nn.PixelShuffle(upscale_factor)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv1(x))
        x = self.relu(self.conv2(x))
        x = self.relu(self.conv3(x))
        return self.pixel_shuffle(self.conv4(x))


class DoubleConv(nn.Sequential):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )


class UNet(nn.Module):
    """Down, up again, and beside what comes up what was there before."""

    def __init__(self, learned: bool) -> None:
        super().__init__()
        self.inc, self.down = DoubleConv(1, 4), DoubleConv(4, 6)
        if learned:
            self.up: nn.Module = nn.ConvTranspose2d(6, 4, kernel_size=2, stride=2)
        else:
            self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.conv = DoubleConv(8 if learned else 10, 4)
        self.outc = nn.Conv2d(4, 2, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.up(self.down(F.max_pool2d(x1, 2)))
        dy, dx = x1.size(2) - x2.size(2), x1.size(3) - x2.size(3)
        x2 = F.pad(x2, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
        return self.outc(self.conv(torch.cat([x1, x2], dim=1)))


def _unet(*skips: Exponents) -> tuple[Exponents, ...]:
    double = ("inc", "down", "conv")
    return (
        *(trade(f"{part}.{i}.weight") for part in double for i in (0, 3)),
        *(trade(f"{part}.1.*") for part in double),
        trade("conv.4.*", "outc.weight"),
        *skips,
    )


_UNET_SPHERES = tuple(f"{part}.{i}.weight" for part in ("inc", "down", "conv") for i in (0, 3))


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.downsample = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.downsample(x)
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer1 = BasicBlock(3, 4, 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(4, 5)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        nn.init.constant_(self.layer1.bn2.weight, 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.avgpool(self.layer1(x)), 1))


class DenseNet(nn.Module):
    """Every layer reads all before it; each channel is normalized where it is read."""

    def __init__(self, growth: int = 3) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, growth, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 + growth)
        self.conv2 = nn.Conv2d(4 + growth, growth, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4 + 2 * growth)
        self.classifier = nn.Linear(4 + 2 * growth, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.conv0(x)]
        for norm, conv in ((self.norm1, self.conv1), (self.norm2, self.conv2)):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        out = F.relu(self.norm(torch.cat(features, 1)), inplace=True)
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(out, (1, 1)), 1))


class ConvNeXtBlock(nn.Module):
    def __init__(self, dim: int, scale: float = 1e-6) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1, self.act = nn.Linear(dim, 2 * dim), nn.GELU()
        self.pwconv2 = nn.Linear(2 * dim, dim)
        self.gamma = nn.Parameter(scale * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.dwconv(x).permute(0, 2, 3, 1)
        y = self.gamma * self.pwconv2(self.act(self.pwconv1(self.norm(y))))
        return x + y.permute(0, 3, 1, 2)


class ChannelsFirst(nn.Module):
    """LayerNorm over the channels of an image, written out."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        x = (x - u) / torch.sqrt(s + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class ConvNeXt(nn.Module):
    def __init__(self, dim: int = 6) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, dim, 2, stride=2), ChannelsFirst(dim))
        self.blocks = nn.Sequential(ConvNeXtBlock(dim), ConvNeXtBlock(dim))
        self.norm, self.head = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(x)).mean([-2, -1])))


CASES = (
    Case(
        "CIFAR network",
        Net,
        lambda: call(torch.randn(2, 3, 20, 20)),
        symmetries=chain("conv1 conv2 fc1 fc2 fc3"),
    ),
    Case(
        "MNIST network with dropout",
        Digits,
        lambda: call(torch.randn(3, 1, 12, 12)),
        symmetries=chain("conv1 conv2 fc1 fc2"),
        mode="train",
    ),
    Case(
        "spatial transformer",
        SpatialTransformer,
        lambda: call(torch.randn(2, 1, 16, 16)),
        symmetries=(
            *chain("localization.0 localization.3 fc_loc.0 fc_loc.2"),
            *chain("conv1 fc1 fc2"),
        ),
        note="the last layer of the localization starts at zero: there nothing before it matters",
    ),
    Case(
        "super-resolution",
        SuperResolution,
        lambda: call(torch.randn(2, 1, 6, 6)),
        symmetries=chain("conv1 conv2 conv3 conv4"),
    ),
    Case(
        "U-Net, transposed convolution",
        lambda: UNet(True),
        lambda: call(torch.randn(3, 1, 9, 9)),
        symmetries=_unet(trade("inc.4.* up.*"), trade("down.4.*", "up.weight")),
        spheres=_UNET_SPHERES,
        granularity=dict.fromkeys(_UNET_SPHERES, "per filter"),
        mode="train",
        note="what comes up stands beside what was there, before a norm that forgets both",
    ),
    Case(
        "U-Net, bilinear",
        lambda: UNet(False),
        lambda: call(torch.randn(3, 1, 8, 8)),
        symmetries=_unet(trade("inc.4.* down.4.*")),
        spheres=_UNET_SPHERES,
        mode="train",
    ),
    Case(
        "residual block, running statistics",
        ResNet,
        lambda: call(torch.randn(3, 3, 8, 8)),
        symmetries=(
            {"layer1.conv1.weight": 1, "layer1.bn1.running_mean": 1, "layer1.bn1.running_var": 2},
            {"layer1.bn1.weight": 1, "layer1.bn1.running_var": 2},
            {
                "layer1.bn1.bias": 1,
                "layer1.bn1.running_var": -2,
                "layer1.bn2.running_mean": 1,
                "layer1.bn2.running_var": 2,
            },
            {"layer1.conv2.weight": 1, "layer1.bn2.running_mean": 1, "layer1.bn2.running_var": 2},
            {"layer1.bn2.weight": 1, "layer1.bn2.running_var": 2},
            {
                "layer1.downsample.0.weight": 1,
                "layer1.downsample.1.running_mean": 1,
                "layer1.downsample.1.running_var": 2,
            },
            {"layer1.downsample.1.weight": 1, "layer1.downsample.1.running_var": 2},
            {
                "layer1.bn2.bias": 1,
                "layer1.downsample.1.bias": 1,
                "layer1.bn2.running_var": -2,
                "layer1.downsample.1.running_var": -2,
                "fc.weight": -1,
            },
        ),
        note="variances move along; the last gain of the block starts at zero",
    ),
    Case(
        "dense connections",
        DenseNet,
        lambda: call(torch.randn(3, 3, 5, 5)),
        symmetries=(
            trade("conv0.weight"),
            trade("conv1.weight"),
            trade("conv2.weight"),
            trade("norm1.*"),
            trade("norm2.*"),
            trade("norm.*", "classifier.weight"),
        ),
        spheres=("conv0.weight", "conv1.weight", "conv2.weight"),
        granularity=dict.fromkeys(("conv0.weight", "conv1.weight", "conv2.weight"), "per filter"),
        mode="train",
        note="side by side, and yet each on its own: the norm after it forgets every channel alone",
    ),
    Case(
        "ConvNeXt",
        ConvNeXt,
        lambda: call(torch.randn(2, 3, 6, 6)),
        symmetries=(
            trade("stem.0.*"),
            trade(
                "stem.1.* blocks.0.gamma blocks.1.gamma",
                "blocks.0.dwconv.weight blocks.1.dwconv.weight",
            ),
            *(trade(f"blocks.{i}.dwconv.*") for i in range(2)),
            *(trade(f"blocks.{i}.norm.*", f"blocks.{i}.pwconv1.weight") for i in range(2)),
            *(trade(f"blocks.{i}.gamma", f"blocks.{i}.pwconv2.*") for i in range(2)),
            trade("norm.*", "head.weight"),
        ),
    ),
)  # fmt: skip
