"""Watch a training: how long are the weights, how far does a step turn them?"""

import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import onsphere as osp

images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)

torch.manual_seed(0)
net = nn.Sequential(
    *(nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU()),
    *(nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU()),
    nn.Linear(64, 10),
)
optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-3)
audit = osp.audit(net, x[:16])

folder = Path(tempfile.mkdtemp())
with osp.Monitor(net, optimizer, audit, path=folder / "run.jsonl") as monitor:
    for _ in range(400):
        batch = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
        optimizer.step()

run = osp.monitor.Run.read(folder / "run.jsonl")
for layer in ("0.weight", "3.weight"):
    norm, rotation = run.series(layer, "norm"), run.series(layer, "rotation")
    print(f"{layer}: length {norm[0]:.2f} -> {norm[-1]:.2f} (law: ", end="")
    print(f"{run.predicted(layer, 'norm')[-1]:.2f}), turned by {rotation[-1]:.3f} radians")
for flag in monitor.flags:
    print(flag)
page = monitor.to_html(folder / "run.html")
print(f"a page with pictures: {page.name}")
