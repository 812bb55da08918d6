"""What watching costs: a training step of a small transformer with a monitor and without.

``python -m benchmarks.monitor [cpu|cuda]``; ``python -m benchmarks.monitor laws`` watches a small
convolutional network instead, and prints what the laws expected.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

import onsphere as osp
from onsphere.report import Table, table

WIDTH, HEADS, DEPTH, LENGTH, BATCH, WORDS = 256, 4, 4, 128, 8, 1000


class Transformer(nn.Module):
    """A pre-norm decoder whose linear layers are followed by a norm of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(DEPTH)
        )
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        x = self.words(words)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def matrices(net: nn.Module) -> dict[str, osp.geometry.VectorAxes]:
    """Every matrix by rows: more than an audit would find, so that the cost is an upper bound."""
    return {n: osp.geometry.VectorAxes((0,)) for n, p in net.named_parameters() if p.ndim > 1}


def trainer(device: str) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], None]]:
    """A network, its optimizer, and one step of its training."""
    torch.manual_seed(0)
    net = Transformer().to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
    words = torch.randint(WORDS, (BATCH, LENGTH + 1), device=device)

    def step() -> None:
        optimizer.zero_grad()
        scores = net(words[:, :-1]).flatten(0, 1)
        nn.functional.cross_entropy(scores, words[:, 1:].flatten()).backward()
        optimizer.step()

    return net, optimizer, step


def measure(device: str, every: int, windows: int, folder: Path) -> list[float]:
    """Step two equal trainings in turn, one watched; ratios of their times over ``every`` steps."""
    clock = _on_device if device == "cuda" else time.process_time
    bare, (net, optimizer, watched) = trainer(device)[2], trainer(device)
    ratios = []
    with osp.Monitor(net, optimizer, matrices(net), every=every, path=folder / "run.jsonl"):
        for _ in range(windows + 1):
            times = [0.0, 0.0]
            for _ in range(every):
                for side, step in enumerate((watched, bare)):
                    start = clock()
                    step()
                    times[side] += clock() - start
            ratios.append(times[0] / times[1])
    return ratios[1:]  # the first window warms up


def _on_device() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def watched_convolutions(steps: int = 1500) -> osp.Monitor:
    """Train two convolutions with BatchNorm on random labels, watched."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip
    images, labels = torch.rand(512, 1, 8, 8), torch.randint(0, 10, (512,))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-3)
    with osp.Monitor(net, optimizer, osp.audit(net, images[:16])) as monitor:
        for _ in range(steps):
            batch = torch.randint(0, 512, (32,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
    return monitor


def main() -> None:
    """Print the ratios for several spacings of the samples, or a watched run."""
    if sys.argv[1:] == ["laws"]:
        print(watched_convolutions())
        return
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    rows = []
    for every, windows in ((1, 31), (10, 9)):
        with tempfile.TemporaryDirectory() as folder:
            ratios = measure(device, every, windows, Path(folder))
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows.append((every, middle, f"{low:.3f} – {high:.3f}"))
        print(f"every={every}: {middle:.4f}", file=sys.stderr, flush=True)
    clock = "wall clock" if device == "cuda" else "processor time"
    note = f"{torch.get_num_threads()} threads on {device}, {clock}; medians; steps alternate."
    columns = ("every", "with / without", "quartiles")
    Console(width=100).print(table(Table("A training step, watched", columns, rows, note)))


if __name__ == "__main__":
    main()
