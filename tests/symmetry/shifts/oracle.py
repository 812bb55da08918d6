"""What shifts there are by numbers alone: the null space of the outputs' derivatives."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

_STEP = 1e-5
_RANK = 1e-7


def null_dimension(
    net: nn.Module, draw: Callable[[torch.Generator], Tensor], draws: int = 4
) -> int:
    """Return in how many directions all vectors can move together and no output does.

    Args:
        net: in float64. Its vectors are the parameters with one axis and, in evaluation mode,
            running means.
        draw: makes inputs; the same directions have to do for all of them.
        draws: how many are made.
    """
    state = {n: t.detach() for n, t in [*net.named_parameters(), *net.named_buffers()]}
    parameters = dict(net.named_parameters())
    vectors = [
        n for n, t in state.items()
        if t.ndim == 1 and (n in parameters or ("running_mean" in n and not net.training))
    ]  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    inputs = [draw(generator) for _ in range(draws)]
    columns = []
    for name in vectors:
        for k in range(state[name].numel()):
            step = torch.zeros_like(state[name])
            step[k] = _STEP
            above, below = (
                outputs(net, {**state, name: state[name] + sign * step}, inputs) for sign in (1, -1)
            )
            columns.append((above - below) / (2 * _STEP))
    values = torch.linalg.svdvals(torch.stack(columns, 1))
    return len(columns) - int((values > _RANK * max(1.0, float(values[0]))).sum())


@torch.no_grad()
def outputs(net: nn.Module, state: Mapping[str, Tensor], inputs: list[Tensor]) -> Tensor:
    """Return all outputs of a network with other weights, in one vector."""
    found = []
    for x in inputs:
        held = {n: t.clone() for n, t in state.items()}
        result = torch.func.functional_call(net, held, (x,))
        found += result if isinstance(result, tuple) else (result,)
    return torch.cat([t.reshape(-1) for t in found])
