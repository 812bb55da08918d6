"""Gradients of weights on spheres: dense, and what is done about those that are not finite."""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from onsphere.optim import kernels
from onsphere.optim.distributed import placement
from onsphere.optim.steps.project import ConstrainedParameters
from onsphere.optim.updates.types import Group

Nonfinite = Literal["skip", "raise"]
"""What a gradient that is not finite does to a sphere optimizer."""
BaseNonfinite = Literal[Nonfinite, "ignore"]
"""What it does to another optimizer, which may also be left to look after itself."""

Hidden = dict[int, tuple[ConstrainedParameters, list[Tensor | None]]]
"""What is constrained, by number, with the gradients that are to be put back."""


def refuse_sparse(grads: Iterable[Tensor], name: str) -> None:
    """Raise for a gradient that is not dense."""
    for grad in grads:
        if grad.layout is not torch.strided:
            raise RuntimeError(
                f"{name} needs a dense gradient for weights on a sphere, got layout "
                f"{grad.layout}; make the layer dense (sparse=False) or leave it out of the "
                "groups with a sphere"
            )


def check_gradients(
    name: str, groups: Sequence[Group], dense: Sequence[bool], *, sharded: bool
) -> None:
    """Raise for gradients that a sphere optimizer cannot take, before anything moves.

    Args:
        name: of the optimizer.
        groups: its param groups.
        dense: of which groups the gradients are known to be dense.
        sharded: whether a parameter is spread over processes.

    Raises:
        RuntimeError: a parameter on a sphere has a sparse gradient.
        FloatingPointError: a gradient is not finite, with ``nonfinite="raise"``.
    """
    strict: dict[int, list[Tensor]] = {}
    for number, group in enumerate(groups):
        if group["nonfinite"] == "skip" and (dense[number] or group["sphere"] is None):
            continue
        params = [p for p in group["params"] if p.grad is not None]
        if group["sphere"] is not None:
            refuse_sparse([p.grad for p in params if p.grad is not None], name)
        if group["nonfinite"] == "raise" and params:
            strict[number] = params
    unfinite = _count_unfinite(list(strict.values()), sharded=sharded) if strict else []
    for number, bad in zip(strict, unfinite, strict=True):
        if bad:
            raise FloatingPointError(
                f"{bad} gradients of param group {number} are "
                'not finite, and nonfinite="raise"; no parameter was moved. Clear '
                'them, or use nonfinite="skip"'
            )


def _count_unfinite(groups: Sequence[list[Tensor]], *, sharded: bool) -> list[int]:
    """Count the dense gradients that are not finite, of all groups in one look."""
    if sharded:
        found = iter(placement.unfinite([[p] for params in groups for p in params]))
        return [sum(next(found) for _ in params) for params in groups]
    counts = []
    for params in groups:
        grads = [p.grad for p in params if p.grad is not None]
        dense = [grad for grad in grads if grad.layout is torch.strided]
        norms = torch.stack(torch._foreach_norm(dense)) if dense else torch.zeros(1)
        counts.append(int((~norms.isfinite()).sum()))
    return counts


class Screen:
    """Takes gradients that are not finite away from a base optimizer, to be put back."""

    def __init__(self) -> None:
        # The last look, which can be made again on gradients that lie where they did.
        self._look: Callable[[list[Tensor]], bool | None] | None = None

    def hide(
        self,
        constrained: Sequence[ConstrainedParameters],
        hidden: Hidden,
        *,
        nonfinite: BaseNonfinite,
        sharded: bool,
    ) -> None:
        """Take what is not finite away.

        Args:
            constrained: parameters on spheres.
            hidden: where what is taken away is noted.
            nonfinite: ``"skip"`` takes it away, ``"raise"`` raises, ``"ignore"`` does not look.
            sharded: whether a parameter is spread over processes.

        Raises:
            RuntimeError: a gradient is sparse.
            FloatingPointError: one is not finite, with ``nonfinite="raise"``.
        """
        grads = [g for held in constrained for p in held.params if (g := p.grad) is not None]
        refuse_sparse(grads, "on_sphere")
        if nonfinite == "ignore" or not grads:
            return
        bad = self._unfinite(constrained, grads, sharded=sharded)
        if bad and nonfinite == "raise":
            raise FloatingPointError(
                f"gradients of {len(bad)} weights on spheres are not finite, and "
                'nonfinite="raise"; no parameter was moved. Clear them, or use nonfinite="skip"'
            )
        for number in bad:
            held = constrained[number]
            hidden.setdefault(number, (held, [p.grad for p in held.params]))
            for param in held.params:
                param.grad = None

    def _unfinite(
        self, constrained: Sequence[ConstrainedParameters], grads: list[Tensor], *, sharded: bool
    ) -> list[int]:
        """Return the numbers of the constrained whose gradients are not finite."""
        if sharded:
            flags = placement.unfinite([held.params for held in constrained])
            return [number for number, flag in enumerate(flags) if flag]
        fine = None if self._look is None else self._look(grads)
        if fine is None:
            fine, self._look = kernels.finite(grads), kernels.finite_of(grads)
        if fine:
            return []
        norms = torch.stack([x.float() for x in torch._foreach_norm(grads)])
        if bool(norms.isfinite().all()):
            return []
        return [
            number
            for number, held in enumerate(constrained)
            if any(p.grad is not None and not p.grad.float().norm().isfinite() for p in held.params)
        ]
