"""Train a small network on scikit-learn's digits, plain and with its filters on spheres."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import onsphere as osp

images, labels = load_digits(return_X_y=True)
x = torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
y = torch.tensor(labels)
order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
train, test = order[:1300], order[1300:]


def network():
    """Return two convolutions with BatchNorm and a linear head, always the same."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(512, 10)),
    )


def run(name, net, optimizer, steps=200):
    """Train, and print what became of the length of the filters."""
    before = net[3].weight.norm().item()
    chance = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = train[torch.randint(len(train), (64,), generator=chance)]
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
        optimizer.step()
    net.eval()
    right = (net(x[test]).argmax(1) == y[test]).float().mean()
    after = net[3].weight.norm().item()
    print(f"{name:>9}: {right:.1%} of {len(test)} test images, length {before:.2f} -> {after:.2f}")


net = network()
run("SGD", net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))
net = network()
groups = osp.audit(net, x[:8]).param_groups(net)
run("SphereSGD", net, osp.optim.SphereSGD(groups, lr=0.1, momentum=0.9))
