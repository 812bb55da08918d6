"""Folding, beside what PyTorch's own tools do: outputs, counts and times.

The published networks are read from the folder that ``ONSPHERE_DATA`` names, the sentence encoder
from the one that ``ONSPHERE_ENCODER`` names (``model.safetensors`` and ``config.json``); what is
not there is left out.
"""

import copy
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.families import FAMILIES, Family
from benchmarks.targets import cifar_resnet
from onsphere.report import Table
from onsphere.symmetry import FoldError, FoldReport, fold

_CONVOLUTIONS = {
    "plain": ("Conv", 1), "grouped": ("Conv", 2), "depthwise": ("Conv", 8),
    "transposed": ("ConvTranspose", 1), "grouped transposed": ("ConvTranspose", 2),
    "depthwise transposed": ("ConvTranspose", 8),
}  # fmt: skip


def tables(names: Sequence[str] = ()) -> Iterator[Table]:
    """Measure everything, or what is named, table by table."""
    data, encoder = os.environ.get("ONSPHERE_DATA"), os.environ.get("ONSPHERE_ENCODER")
    measures: dict[str, Callable[[], Table]] = {"convolutions": convolutions, "families": families}
    if data:
        measures["checkpoints"] = lambda: checkpoints(Path(data))
    if encoder:
        measures["sentences"] = lambda: sentences(Path(encoder))
    if find_spec("torchvision"):
        measures["vision"] = vision
    if find_spec("timm"):
        measures["timm"] = timm_networks
    for name in names or measures:
        yield measures[name]()


def live(model: nn.Module, *inputs: Any, **named: Any) -> nn.Module:
    """Give norms random gains, shifts, and the statistics of some inputs."""
    generator = torch.Generator().manual_seed(0)

    def measure(module: nn.Module, given: tuple[Any, ...]) -> None:
        x = given[0]
        axes = [a for a in range(x.ndim) if a != 1]
        module.running_mean.copy_(x.mean(axes))  # type: ignore[operator,union-attr]
        module.running_var.copy_(x.var(axes, correction=0) + 1e-3)  # type: ignore[operator,union-attr]

    hooks = []
    for module in model.modules():
        norm = "norm" in type(module).__name__.lower()
        for name, p in module.named_parameters(recurse=False) if norm else ():
            if p.ndim == 1:
                drawn = torch.rand(p.shape, generator=generator).to(p)
                p.data = 0.5 + drawn if name != "bias" else drawn - 0.5
        if getattr(module, "running_mean", None) is not None:
            hooks.append(module.register_forward_pre_hook(measure))
    with torch.no_grad():
        model.eval()(*inputs, **named)
    for hook in hooks:
        hook.remove()
    return model


# --- every convolution ----------------------------------------------------------------------------


def convolutions() -> Table:
    """Fold a norm into every kind of convolution, and let PyTorch's own tools do it."""
    rows = []
    for dimensions in (1, 2, 3):
        for kind, (of, groups) in _CONVOLUTIONS.items():
            worst = [0.0, 0.0, 0.0, 0.0]
            theirs = []
            for bias in (True, False):
                for affine in (True, False):
                    net, x = _one(dimensions, of, groups, bias, affine)
                    report = fold(net, x).report
                    there = report.count("batchnorm") == (1, 1)
                    worst[0] = max(worst[0], report.change_in_float64 if there else 1.0)
                    worst[1] = max(worst[1], report.change if there else 1.0)
                    theirs.append(_change(_by_fx, net, x))
                    theirs.append(_change(_by_fusion, net, x))
            rows.append(
                (f"{dimensions}-D {kind}", *worst[:2], _worst(theirs[::2]), _worst(theirs[1::2]))
            )
    columns = ("convolution", "float64", "float32", "torch.fx fuse", "torch.nn.utils.fusion")
    note = (
        "Largest relative change of the output of four networks each (with and without bias, "
        "affine or not); theirs in float32."
    )
    return Table("Conv, BatchNorm, ReLU", columns, [_said(r) for r in rows], note)


def _one(
    dimensions: int, of: str, groups: int, bias: bool, affine: bool
) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    outputs = 8 if groups == 8 else 12
    conv = getattr(nn, f"{of}{dimensions}d")(8, outputs, 3, 1, 1, groups=groups, bias=bias)
    norm = getattr(nn, f"BatchNorm{dimensions}d")(outputs, affine=affine)
    x = torch.randn(2, 8, *[6] * dimensions)
    return live(nn.Sequential(conv, norm, nn.ReLU()), x), x


def _by_fx(model: nn.Module) -> nn.Module:
    from torch.fx.experimental.optimization import fuse

    fused: nn.Module = fuse(model)
    left = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in fused.modules())
    if left:
        raise NotImplementedError("does not fold it" if left == 1 else f"{left} norms left")
    return fused


def _by_fusion(model: nn.Module) -> nn.Module:
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    conv, norm, rest = model  # type: ignore[misc]
    transpose = isinstance(conv, nn.modules.conv._ConvTransposeNd)
    return nn.Sequential(fuse_conv_bn_eval(conv, norm, transpose), rest)


def _change(how: Callable[[nn.Module], nn.Module], net: nn.Module, x: Any) -> float | str:
    try:
        with torch.no_grad():
            fused = how(copy.deepcopy(net).eval())
            before, after = net(x), fused(x)
    except Exception as error:
        first = (str(error) or repr(error)).splitlines()[0]
        return first if isinstance(error, NotImplementedError) else f"raises {type(error).__name__}"
    return float((after - before).abs().max() / before.abs().max())


def _worst(found: list[float | str]) -> float | str:
    words = sorted({f for f in found if isinstance(f, str)})
    numbers = [f for f in found if not isinstance(f, str)]
    if not words:
        return max(numbers)
    some = f" ({len(found) - len(numbers)} of {len(found)})" if numbers else ""
    return ", ".join(words) + some + (f", else {max(numbers):.1e}" if numbers else "")


def _said(row: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(f"{x:.1e}" if isinstance(x, float) else x for x in row)


# --- networks -------------------------------------------------------------------------------------


def families() -> Table:
    """Fold tiny models of many `transformers` families."""
    rows = [(family.name, *_of_family(family)) for family in FAMILIES]
    columns = (
        "family", "folded", "stays", "LayerNorms centred", "float64", "float32",
        "why it stays, mostly",
    )  # fmt: skip
    note = "Tiny random models, two layers, random gains and shifts."
    return Table("transformers", columns, [_said(r) for r in rows], note)


def _of_family(family: Family) -> tuple[Any, ...]:
    model, inputs = family.build()
    live(model, **inputs)
    try:
        report = fold(model, (), inputs, output=family.output).report
    except FoldError as error:
        return ("-", "-", "-", "-", "-", str(error))
    centred, norms = report.count("centering")
    return (
        len(report.folded) - centred, len(report.kept) - norms + centred,
        f"{centred} of {norms}" if norms else "", report.change_in_float64, report.change,
        _mostly(report),
    )  # fmt: skip


def _mostly(report: FoldReport) -> str:
    reasons = [_kind_of(p.reason) for p in report.kept if p.kind != "centering"]
    return max(sorted(set(reasons)), key=reasons.count, default="")


def _kind_of(reason: str) -> str:
    if "tied" in reason:
        return "tied embedding"
    if "reads its output, and is no linear map" in reason:
        return f"{reason.split()[0]} reads it"
    return reason


def checkpoints(folder: Path) -> Table:
    """Fold the published CIFAR ResNets, and classify real images with them."""
    with np.load(folder / "cifar10" / "cifar10_lossless_first4000_train.npz") as file:
        x = torch.from_numpy(file["images"]).permute(0, 3, 1, 2).float() / 255
        y = torch.from_numpy(file["labels"]).long()
    rows = []
    for name, blocks in (("resnet20", 3), ("resnet56", 9)):
        model = cifar_resnet(folder, name, blocks)
        start = time.process_time()
        folded = fold(model, x[:16])
        seconds = time.process_time() - start
        fused = _by_fx(copy.deepcopy(model))
        a, b, c = (_classified(m, x) for m in (model, folded.model, fused))
        report = folded.report
        times = [_fastest(m, x[:64]) for m in (model, folded.model, fused)]
        rows.append(
            (
                name, "{} of {}".format(*report.count("batchnorm")), report.change_in_float64,
                report.change, f"{int((a == y).sum())} / {int((b == y).sum())}",
                f"{int((a != b).sum())} / {int((a != c).sum())}",
                " / ".join(f"{1e3 * t:.0f}" for t in times), f"{seconds:.1f}",
            )
        )  # fmt: skip
    columns = (
        "checkpoint", "folded", "float64", "float32", "right before / after",
        "images that change class, ours / torch.fx", "ms for 64 images: as it is / ours / torch.fx",
        "CPU s to fold",
    )  # fmt: skip
    note = f"{len(y)} lossless CIFAR-10 images (of the training set)."
    return Table("Published networks", columns, [_said(r) for r in rows], note)


def _classified(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(some).argmax(1) for some in x.split(250)])


def _fastest(model: nn.Module, x: Tensor, turns: int = 15) -> float:
    found = []
    with torch.no_grad():
        for _ in range(turns):
            start = time.perf_counter()
            model(x)
            found.append(time.perf_counter() - start)
    return min(found)


_SENTENCES = (
    "A normalization layer is a projection and an affine map.",
    "LayerNorm centres the activations and scales them to one length.",
    "The cat sat on the mat.", "A dog lies on a rug.",
    "Interest rates rose again this quarter.", "The central bank raised rates.",
    "How do I fold batch normalization into a convolution?",
    "Merging BatchNorm with the preceding conv layer for inference.",
    "Es regnet seit drei Tagen.", "It has been raining for three days.",
)  # fmt: skip


def sentences(folder: Path) -> Table:
    """Fold a published sentence encoder, and compare all cosines of some sentences."""
    from transformers import BertModel, BertTokenizerFast

    model = BertModel.from_pretrained(folder).eval()
    tokens = BertTokenizerFast(vocab_file=str(folder / "vocab.txt"))
    batch = dict(tokens(list(_SENTENCES), padding=True, return_tensors="pt"))

    def cosines(m: nn.Module) -> Tensor:
        with torch.no_grad():
            hidden, mask = m(**batch).last_hidden_state, batch["attention_mask"][..., None]
        means = nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        return means @ means.T

    start = time.process_time()
    folded = fold(model, (), batch, output=lambda r: r.last_hidden_state)
    seconds = time.process_time() - start
    moved = float((cosines(folded.model) - cosines(model)).abs().max())
    report = folded.report
    row = (
        "all-MiniLM-L6-v2", f"{len(report.folded)} of {len(report.folded) + len(report.kept)}",
        report.change_in_float64, report.change, moved, f"{seconds:.1f}", _mostly(report),
    )  # fmt: skip
    columns = (
        "encoder",
        "folded",
        "float64",
        "float32",
        "cosines move by",
        "CPU s",
        "why the rest stays",
    )
    return Table("A published sentence encoder", columns, [_said(row)])


_VISION = {
    "resnet18": {}, "resnet50": {}, "mobilenet_v2": {}, "mobilenet_v3_small": {},
    "efficientnet_b0": {}, "mnasnet0_5": {}, "shufflenet_v2_x0_5": {}, "densenet121": {},
    "convnext_tiny": {}, "swin_t": {}, "vit_b_16": {"image_size": 64},
}  # fmt: skip


def vision() -> Table:
    """Fold torchvision's networks with random weights."""
    import torchvision

    rows = []
    for name, options in _VISION.items():
        torch.manual_seed(0)
        model = getattr(torchvision.models, name)(weights=None, **options)
        x = torch.randn(2, 3, 64, 64)
        live(model, x)
        start = time.process_time()
        try:
            report = fold(model, x).report
        except FoldError as error:
            rows.append((name, "-", "-", "-", "-", "-", "-", str(error)))
            continue
        seconds = time.process_time() - start
        counts = ["{} of {}".format(*report.count(k)) for k in ("batchnorm", "gain", "scale")]
        counts = [c if c != "0 of 0" else "" for c in counts]
        theirs = _change(_by_fx, model, x)
        rows.append(
            (
                name, *counts, report.change_in_float64, report.change, theirs, f"{seconds:.1f}",
                _mostly(report),
            )
        )  # fmt: skip
    columns = (
        "network", "BatchNorm", "gains", "layer scale", "float64", "float32", "torch.fx fuse",
        "CPU s", "why some stay",
    )  # fmt: skip
    note = "Random weights, statistics of the input, 2 images of 64 x 64 pixels."
    return Table("torchvision", columns, [_said(r) for r in rows], note)


_PIXELS = (64, 128)
_SECONDS = 240


def timm_networks() -> Table:
    """Fold one small network of each module of timm, with random weights."""
    from benchmarks.atlas.timm_networks import NETWORKS

    rows = []
    for name in NETWORKS:
        rows.append(of_timm(name))
        print(" | ".join(_said(rows[-1])), file=sys.stderr, flush=True)
    columns = (
        "network", *_TIMM_KINDS.values(), "float64", "float32", "CPU s", "why some stay",
    )  # fmt: skip
    return Table("timm", columns, [_said(r) for r in rows], "Random weights, 2 small images.")


_TIMM_KINDS = {
    "batchnorm": "BatchNorm", "gain": "gains", "scale": "layer scale",
    "centering": "LayerNorms centred", "weight": "computed weights",
}  # fmt: skip


def of_timm(name: str) -> tuple[Any, ...]:
    """Return what folding one network does: a row of the table."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    x = _images_for(model)
    live(model, x)
    start = time.process_time()
    try:
        with _within(_SECONDS):
            report = fold(model, x).report
    except (FoldError, TimeoutError) as error:
        return (name, *[""] * len(_TIMM_KINDS), "", "", "", str(error))
    counts = [report.count(k) for k in _TIMM_KINDS]
    there = any(n for _, n in counts)
    return (
        name, *("{} of {}".format(*c) if c[1] else "" for c in counts),
        *((report.change_in_float64, report.change) if there else ("", "")),
        f"{time.process_time() - start:.0f}", _mostly(report),
    )  # fmt: skip


def _images_for(model: nn.Module) -> Tensor:
    """Return the smallest images that a network takes, up to the size that it was made for."""
    own = model.pretrained_cfg["input_size"]  # type: ignore[index,union-attr]
    for pixels in (*_PIXELS, own[-1]):
        x = torch.randn(2, own[0], pixels, pixels)
        try:
            with torch.no_grad():
                model.eval()(x)
        except (AssertionError, RuntimeError, ValueError):
            continue
        return x
    return torch.randn(2, *own)


@contextmanager
def _within(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"given up after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
