"""Audit a model: which of its weights does weight decay really act on?"""

import torch
from torch import nn

import onsphere as osp


class Block(nn.Module):
    """A residual block as many networks have it: convolution, BatchNorm, twice."""

    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x):
        """Add what the two convolutions make to the input."""
        hidden = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(x + self.bn2(self.conv2(hidden)))


torch.manual_seed(0)
stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
model = nn.Sequential(stem, Block(8), Block(8), head)
images = torch.rand(4, 3, 8, 8)

audit = osp.audit(model, images)
print(audit)

print("\nPARAM GROUPS")
for group in audit.param_groups(model, weight_decay=5e-4):
    place = "on spheres" if group["sphere"] else f"weight decay {group['weight_decay']}"
    print(f"  {place}: {len(group['params'])} weights")
