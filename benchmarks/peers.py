"""Folding, equalizing and coupled channels beside AIMET and torch-pruning.


``python -m benchmarks peers``; needs torchvision, transformers, aimet-torch and torch-pruning, of
which the project itself needs none.
"""

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import onsphere as osp
from benchmarks.folding import live
from benchmarks.int8 import network
from onsphere.report import Table
from onsphere.symmetry.channels.families import channel_symmetries
from onsphere.symmetry.rewrite.weight_grid import loss

_BITS = 8


class _Attention(nn.Module):
    """A pre-norm block: attention, and an MLP with ReLU."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.maps = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.up, self.down, self.heads = (
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
            heads,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the stream behind the block."""
        n, t, width = x.shape
        h = self.norms[0](x)
        q, k, v = (m(h).view(n, t, self.heads, -1).transpose(1, 2) for m in self.maps[:3])
        mixed = torch.softmax(q @ k.transpose(2, 3) / (width / self.heads) ** 0.5, -1) @ v
        x = x + self.maps[3](mixed.transpose(1, 2).reshape(n, t, width))
        return x + self.down(torch.relu(self.up(self.norms[1](x))))


class _Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
            nn.ConvTranspose2d(8, 8, 2, stride=2, groups=2), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 4, 3),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Return the features."""
        out: Tensor = self.layers(x)
        return out


def _vision(name: str) -> Callable[[], tuple[nn.Module, Tensor]]:
    def made() -> tuple[nn.Module, Tensor]:
        from torchvision import models

        return getattr(models, name)(), torch.randn(2, 3, 64, 64)

    return made


def _models() -> dict[str, Callable[[], tuple[nn.Module, Tensor]]]:
    return {
        "depthwise-separable (of `int8`)": lambda: (network(), torch.rand(4, 1, 28, 28)),
        "grouped transposed convolution": lambda: (_Grouped(), torch.randn(2, 3, 16, 16)),
        "resnet18": _vision("resnet18"),
        "mobilenet_v2": _vision("mobilenet_v2"),
        "densenet121": _vision("densenet121"),
        "pre-norm attention block": lambda: (_Attention(), torch.randn(2, 5, 32)),
    }


def tables(words: Sequence[str] = ()) -> Iterator[Table]:
    """Fold, equalize and count, model by model; ``words`` names some."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    known = _models()
    unknown = [w for w in words if w not in known]
    if unknown:
        raise SystemExit(f"{unknown[0]!r} is none of {', '.join(known)}")
    rows, equalized, coupled = [], [], []
    for name in words or known:
        torch.manual_seed(0)
        net, x = known[name]()
        live(net.eval(), x)
        rows.append((name, *_folded(net, x)))
        equalized.append((name, *_equalized(net, x)))
        coupled.append((name, *_coupled(net, x)))
    yield Table(
        "BatchNorm folded", ("network", "norms", "ours: left, moved", "AIMET: left, moved"), rows,
        "Relative change of the output in float32.",
    )  # fmt: skip
    yield Table(
        "Weights equalized after folding",
        ("network", "loss before", "ours: range", "ours: quantization", "AIMET", "moved, ours",
         "moved, AIMET"),
        equalized,
        f"Mean over weights of the relative squared error of {_BITS}-bit weights, one step per "
        "weight. Every channel got a factor of up to 10 along our families first.",
    )  # fmt: skip
    yield Table(
        "Channels that belong together, after folding",
        ("network", "our families", "weights in them", "torch-pruning groups", "weights in them"),
        coupled,
        "Ours scale together, theirs are cut together: a smooth activation ends a family, not a "
        "group.",
    )


def _norms(net: nn.Module) -> int:
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules())


def _moved(net: nn.Module, other: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        before, after = net(x), other(x)
    return float((after - before).abs().max() / before.abs().max())


def _tried(how: Callable[[], Any]) -> Any:
    try:
        return how()
    except Exception as error:
        return f"raises {type(error).__name__}"


def _folded(net: nn.Module, x: Tensor) -> tuple[str, ...]:
    from aimet_torch.batch_norm_fold import fold_all_batch_norms

    ours = osp.fold(net, x, what="batchnorm").model

    def theirs() -> str:
        other = copy.deepcopy(net)
        fold_all_batch_norms(other, None, x)
        return f"{_norms(other)}, {_moved(net, other, x):.1e}"

    return str(_norms(net)), f"{_norms(ours)}, {_moved(net, ours, x):.1e}", _tried(theirs)


def _equalized(net: nn.Module, x: Tensor) -> tuple[str, ...]:
    from aimet_torch.cross_layer_equalization import CrossLayerScaling

    from benchmarks.int8 import spread_out

    start = osp.fold(net, x).model
    spread_out(start, x, 0, 10.0)
    by_range = osp.equalize(start, x).model
    by_loss = osp.equalize(start, x, objective="quantization", bits=_BITS).model

    def theirs() -> tuple[str, str]:
        other = copy.deepcopy(start)
        CrossLayerScaling.scale_model(other, None, x)
        return f"{_loss(other):.1e}", f"{_moved(start, other, x):.1e}"

    found = _tried(theirs)
    loss, moved = found if isinstance(found, tuple) else (found, "")
    return (
        f"{_loss(start):.1e}", f"{_loss(by_range):.1e}", f"{_loss(by_loss):.1e}", loss,
        f"{_moved(start, by_range, x):.1e}", moved,
    )  # fmt: skip


def _loss(net: nn.Module) -> float:
    losses = [loss(p, _BITS) for p in net.parameters() if p.ndim > 1]
    return sum(losses) / len(losses)


def _coupled(net: nn.Module, x: Tensor) -> tuple[str, ...]:
    import torch_pruning

    start = osp.fold(net, x).model
    families = channel_symmetries(start, (x,), {})
    names = {n for f in families for n in f.names}

    def theirs() -> tuple[str, str]:
        graph = torch_pruning.DependencyGraph().build_dependency(copy.deepcopy(start), x)
        groups = list(graph.get_all_groups())
        modules = {item.dep.target.name for group in groups for item in group}
        layers = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._BatchNorm, nn.LayerNorm)
        known = {n for n, m in start.named_modules() if isinstance(m, layers)}
        return str(len(groups)), str(len({m.split(" ")[0] for m in modules} & known))

    found = _tried(theirs)
    groups, within = found if isinstance(found, tuple) else (found, "")
    return str(len(families)), str(len(names)), groups, within
