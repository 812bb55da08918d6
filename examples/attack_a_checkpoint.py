"""Train a small network, save it, and ask of the file: is its robust accuracy real?"""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import nn

from onsphere.robustness import accuracy, evaluate, pgd

images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)


def network():
    """Return the network whose weights are in the file."""
    return nn.Sequential(
        *(nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
    )


torch.manual_seed(0)
net = network()
optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
for _ in range(200):
    batch = torch.randint(1300, (64,))
    optimizer.zero_grad()
    nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
    optimizer.step()
checkpoint = Path(tempfile.mkdtemp()) / "net.safetensors"
save_file(net.state_dict(), checkpoint)

loaded = network()
loaded.load_state_dict(load_file(checkpoint))
loaded.eval()
x, y = x[1300:1500], y[1300:1500]
print(evaluate(loaded, (x, y), eps=0.1, attacks="quick"))


def confident(x):
    """Make the same decisions with logits a thousand times larger."""
    return 1000 * loaded(x)


print(f"\nPGD alone, logits * 1000: {accuracy(confident, pgd(confident, x, y, eps=0.1), y):.3f}")
masked = evaluate(confident, (x, y), eps=0.1, attacks="quick")
print(f"evaluate, logits * 1000:  {masked.robust_accuracy.value:.3f}")
