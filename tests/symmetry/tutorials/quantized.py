"""Adapters and quantizers: straight-through gradients, detached norms, weights made by networks."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from symmetry.tutorials.case import Case, call, tokens, trade


class LoRALinear(nn.Module):
    """A frozen weight and a product of two thin ones, of which the second starts at zero."""

    def __init__(self, inputs: int, outputs: int, rank: int = 2, alpha: float = 4.0) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.lora_A = nn.Parameter(torch.empty(rank, inputs))
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scaling, self.dropout = alpha / rank, nn.Dropout(0.05)

    def forward(self, x: Tensor) -> Tensor:
        update = (self.dropout(x) @ self.lora_A.transpose(0, 1)) @ self.lora_B.transpose(0, 1)
        return self.base(x) + update * self.scaling


class DoRALinear(LoRALinear):
    """Length and direction apart; the length of the direction counts as a constant."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.magnitude = nn.Parameter(self.base.weight.norm(p=2, dim=1).clone())

    def forward(self, x: Tensor) -> Tensor:
        weight = self.base.weight + self.scaling * self.lora_B @ self.lora_A
        norm = weight.norm(p=2, dim=1).detach()
        return F.linear(x, (self.magnitude / norm).view(-1, 1) * weight, self.base.bias)


class Adapted(nn.Module):
    def __init__(self, layer: type[LoRALinear]) -> None:
        super().__init__()
        self.l1, self.l2, self.head = layer(5, 6), layer(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.l2(F.relu(self.l1(x)))))


def round_pass(x: Tensor) -> Tensor:
    return (x.round() - x).detach() + x


def grad_scale(x: Tensor, scale: float) -> Tensor:
    return (x - x * scale).detach() + x * scale


class LsqLinear(nn.Linear):
    """Weights in steps of a learned size."""

    def __init__(self, inputs: int, outputs: int, bits: int = 3) -> None:
        super().__init__(inputs, outputs)
        self.low, self.high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        start = 2 * self.weight.detach().abs().mean() / math.sqrt(self.high)
        self.step = nn.Parameter(start.reshape(1))

    def forward(self, x: Tensor) -> Tensor:
        s = grad_scale(self.step, 1.0 / math.sqrt(self.high * self.weight.numel()))
        w = round_pass((self.weight / s).clamp(self.low, self.high)) * s
        return F.linear(x, w, self.bias)


class LsqActivation(nn.Module):
    def __init__(self, bits: int = 4) -> None:
        super().__init__()
        self.high = 2**bits - 1
        self.step = nn.Parameter(torch.tensor(0.2))

    def forward(self, x: Tensor) -> Tensor:
        return round_pass((x / self.step).clamp(0, self.high)) * self.step


class BitLinear(nn.Linear):
    """Three values per weight and eight bits per activation, by their own largest or mean size."""

    def __init__(self, inputs: int, outputs: int, eps: float = 1e-5) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        scale = 127.0 / x.abs().max(dim=-1, keepdim=True).values.clamp(min=self.eps)
        quantized = (x * scale).round().clamp(-128, 127) / scale
        x = x + (quantized - x).detach()
        scale = 1.0 / self.weight.abs().mean().clamp(min=self.eps)
        w = (self.weight * scale).round().clamp(-1, 1) / scale
        return F.linear(x, self.weight + (w - self.weight).detach())


class BitNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.up, self.down = BitLinear(6, 8), BitLinear(8, 7)

    def forward(self, ids: Tensor) -> Tensor:
        return self.down(F.relu(self.up(self.embed(ids))) ** 2)


class Signs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (x.abs() <= 1)


class BinaryConv(nn.Conv2d):
    """Signs of weights, times the mean size of each filter; signs of what comes in."""

    def forward(self, x: Tensor) -> Tensor:
        alpha = self.weight.abs().mean(dim=(1, 2, 3), keepdim=True)
        w = Signs.apply(self.weight) * alpha
        return F.conv2d(Signs.apply(x), w, self.bias, self.stride, self.padding)


class XnorNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = BinaryConv(4, 5, 3), nn.BatchNorm2d(5)
        self.fc = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        return self.fc(x.mean(dim=(2, 3)))


class HyperNetwork(nn.Module):
    """One network makes the weights of the other from a vector for each of its layers."""

    def __init__(self, width: int = 4, z: int = 3) -> None:
        super().__init__()
        self.width = width
        self.z = nn.Parameter(torch.randn(2, z))
        self.hidden = nn.Linear(z, 6)
        self.to_weight, self.to_bias = nn.Linear(6, width * width), nn.Linear(6, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        for z in self.z:
            h = torch.relu(self.hidden(z))
            w = self.to_weight(h).view(self.width, self.width)
            x = F.relu(F.linear(x, w, self.to_bias(h)))
        return self.head(x)


_LORA = (
    trade("l1.lora_A", "l1.lora_B"),
    trade("l2.lora_A", "l2.lora_B"),
    trade("l1.base.* l1.lora_B", "l2.base.weight l2.lora_B"),
    trade("l2.base.* l2.lora_B", "head.weight"),
)

CASES = (
    Case(
        "low-rank adapters",
        lambda: Adapted(LoRALinear),
        lambda: call(torch.randn(4, 5)),
        symmetries=_LORA,
        mode="train",
        note="at the start the second factor is zero and hides the first",
    ),
    Case(
        "adapters with length and direction",
        lambda: Adapted(DoRALinear),
        lambda: call(torch.randn(4, 5)),
        symmetries=(
            *_LORA[:2],
            trade("l1.base.weight l1.lora_B"),
            trade("l2.base.weight l2.lora_B"),
            trade("l1.magnitude l1.base.bias", "l2.magnitude"),
            trade("l2.magnitude l2.base.bias", "head.weight"),
        ),
        mode="train",
        note="the norm is detached: a symmetry of the function, which the gradient does not show",
    ),
    Case(
        "learned step sizes",
        lambda: nn.Sequential(LsqLinear(5, 6), nn.ReLU(), LsqActivation(), LsqLinear(6, 3)),
        lambda: call(torch.randn(6, 5)),
        symmetries=(trade("0.weight 0.step 0.bias 2.step", "3.weight 3.step"),),
        mode="train",
        jumps=True,
        note="between two steps nothing changes, and yet the weight is not free of its step",
    ),
    Case(
        "ternary weights",
        BitNet,
        lambda: call(tokens(4, 3, among=7)),
        symmetries=(trade("embed.weight"), trade("up.weight")),
        spheres=("embed.weight", "up.weight"),
        granularity={"embed.weight": "per row", "up.weight": "whole tensor"},
        mode="train",
        jumps=True,
    ),
    Case(
        "signs of weights and activations",
        XnorNet,
        lambda: call(torch.randn(4, 1, 7, 7)),
        symmetries=(
            trade("conv1.weight"),
            trade("bn1.*"),
            trade("conv2.weight"),
            trade("bn2.*", "fc.weight"),
        ),
        spheres=("conv1.weight", "conv2.weight"),
        inert=("conv1.bias", "conv2.bias"),
        granularity=dict.fromkeys(("conv1.weight", "conv2.weight"), "per filter"),
        mode="train",
        jumps=True,
    ),
    Case(
        "weights made by a network",
        HyperNetwork,
        lambda: call(torch.randn(5, 4)),
        symmetries=(
            trade("z", "hidden.weight"),
            trade("hidden.*", "to_weight.weight to_bias.weight"),
        ),
        note="the same layer twice: its output cannot grow once",
    ),
)
