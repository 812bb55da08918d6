"""Every optimizer of the contract suite, and the schedulers: two tables."""

from dataclasses import dataclass
from functools import partial

import torch

from onsphere.optim import SphereAdamW, SphereSGD, on_sphere

T, S = torch.optim, torch.optim.lr_scheduler


@dataclass(frozen=True)
class Member:
    """One optimizer in one mode.

    Attributes:
        kind: the class, with its own settings.
        mode: of ``on_sphere``; ``None`` for an optimizer that is on the sphere by itself.
        lr: a rate at which it converges on the suite's problem.
        closure: needs a closure at every step.
        matrices: takes matrices only.
        maximizes: knows ``maximize``.
        tensor_lr: takes a tensor as ``lr``.
        decays: has ``weight_decay``.
        gaps: takes tensors with gaps in memory; torch's fused kernels silently do not.
    """

    kind: partial
    mode: str | None = None
    lr: float = 0.1
    closure: bool = False
    matrices: bool = False
    maximizes: bool = True
    tensor_lr: bool = True
    decays: bool = True
    gaps: bool = True

    def build(self, params, sphere, **settings):
        """Build it for parameters (or named ones) that all live on one kind of sphere."""
        settings = {"lr": self.lr, **settings}
        nonfinite = settings.pop("nonfinite", "skip")
        if self.mode is None:
            return self.kind(
                [{"params": params, "sphere": sphere}], **settings, nonfinite=nonfinite
            )
        base = self.kind(params, **settings)
        spheres = {p: sphere for group in base.param_groups for p in group["params"]}
        return on_sphere(base, spheres, self.mode, nonfinite=nonfinite)


SGD = partial(T.SGD, momentum=0.9)
ADAMW = partial(T.AdamW, weight_decay=0.0)
MEMBERS = {
    "SphereSGD": Member(partial(SphereSGD, momentum=0.9)),
    "SphereSGD, Nesterov, exponential": Member(
        partial(SphereSGD, momentum=0.9, nesterov=True, retraction="exponential")
    ),
    "SphereSGD, rotation": Member(partial(SphereSGD, momentum=0.5, lr_mode="angle"), lr=0.05),
    "SphereAdamW": Member(SphereAdamW),
    "SphereAdamW, per vector": Member(partial(SphereAdamW, second_moment="vector")),
    "SphereAdamW, rotation, exponential": Member(
        partial(SphereAdamW, lr_mode="angle", retraction="exponential"), lr=0.05
    ),
    "hard SGD": Member(SGD, "hard"),
    "hard AdamW": Member(ADAMW, "hard"),
    "hard AdamW fused": Member(partial(ADAMW, fused=True), "hard", gaps=False),
    "hard Adam": Member(T.Adam, "hard"),
    "hard RMSprop": Member(T.RMSprop, "hard", lr=0.05, tensor_lr=False),
    "hard NAdam": Member(T.NAdam, "hard", tensor_lr=False),
    "hard Adafactor": Member(T.Adafactor, "hard", lr=0.3),
    "hard Muon": Member(
        partial(T.Muon, weight_decay=0.0), "hard", lr=0.4, matrices=True, maximizes=False
    ),
    "hard LBFGS": Member(
        T.LBFGS, "hard", lr=0.5, closure=True, maximizes=False, tensor_lr=False, decays=False
    ),
    "rotate SGD": Member(SGD, "rotate", lr=0.05),
    "rotate AdamW": Member(ADAMW, "rotate", lr=0.05),
    "brake SGD": Member(SGD, "brake"),
    "brake AdamW": Member(ADAMW, "brake"),
}
SCHEDULERS = {
    "Step": lambda o: S.StepLR(o, 2),
    "MultiStep": lambda o: S.MultiStepLR(o, [2, 4]),
    "Exponential": lambda o: S.ExponentialLR(o, 0.9),
    "Cosine": lambda o: S.CosineAnnealingLR(o, 5),
    "Warm restarts": lambda o: S.CosineAnnealingWarmRestarts(o, 3),
    "OneCycle": lambda o: S.OneCycleLR(o, 0.1, total_steps=10, cycle_momentum=False),
    "Cyclic": lambda o: S.CyclicLR(o, 0.01, 0.1, cycle_momentum=False),
    "Linear": lambda o: S.LinearLR(o),
    "Lambda": lambda o: S.LambdaLR(o, lambda t: 1 / (t + 1)),
    "Multiplicative": lambda o: S.MultiplicativeLR(o, lambda t: 0.9),
    "Polynomial": lambda o: S.PolynomialLR(o),
    "Constant": lambda o: S.ConstantLR(o),
    "Sequential": lambda o: S.SequentialLR(o, [S.ConstantLR(o), S.ExponentialLR(o, 0.9)], [2]),
    "Chained": lambda o: S.ChainedScheduler([S.ConstantLR(o), S.ExponentialLR(o, 0.9)]),
    "Plateau": lambda o: S.ReduceLROnPlateau(o, patience=0),
    "SWA": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.01),
}


def target(generator, *shape):
    """A direction per row."""
    goal = torch.randn(*shape, generator=generator)
    return goal / goal.flatten(1).norm(dim=1).reshape(-1, *[1] * (goal.ndim - 1))


def loss_of(weight, goal):
    """Minus the cosine of each row with its goal: least, -1 per row, at the goals."""
    rows = weight.float().flatten(1)
    return -(rows / rows.norm(dim=1, keepdim=True) * goal.flatten(1)).sum()


def train(member, weight, optimizer, goal, steps, after=None):
    """Take steps on the problem; return the losses before each."""
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = loss_of(weight, goal)
        loss.backward()
        return loss

    for _ in range(steps):
        if member.closure:
            losses.append(loss_of(weight.detach(), goal).item())
            optimizer.step(closure)
        else:
            losses.append(closure().item())
            optimizer.step()
        if after:
            after()
    return losses


def feed(member, weight, optimizer, *grads):
    """Take one step for each gradient, whatever the weight is."""
    for grad in grads:
        weight.grad = None if grad is None else grad.clone()
        if member.closure:
            optimizer.step(lambda: 0.0)
        else:
            optimizer.step()
