"""Audits and rewrites within ``torch.inference_mode()``, and of what was made in it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from onsphere.symmetry import (
    Audit,
    audit,
    canonicalize,
    equalize,
    fold,
    rescaled,
    shifted,
    with_norms,
)

Rewrite = Callable[[nn.Module, Audit], Any]
REWRITES: dict[str, Rewrite] = {
    "shifted": shifted,
    "rescaled": rescaled,
    "with_norms": lambda net, found: with_norms(net, found, {"2.weight": 3.0}),
    "canonicalize": canonicalize,
}


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2)).eval()


def _copy_of(result: Any) -> nn.Module:
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("rewrite", REWRITES.values(), ids=REWRITES)
@pytest.mark.parametrize("made_there", [False, True])
def test_a_copy_made_in_inference_mode_can_be_trained(rewrite: Rewrite, made_there: bool) -> None:
    x = torch.randn(5, 3)
    with torch.inference_mode(made_there):
        net = _net()
    with torch.inference_mode():
        twin = _copy_of(rewrite(net, audit(net, x)))
    with torch.no_grad():
        torch.testing.assert_close(twin(x), net(x), rtol=1e-5, atol=1e-5)
    twin(x).sum().backward()
    assert all(p.grad is not None for p in twin.parameters())


def _same(a: Audit, b: Audit) -> bool:
    return (a.scale_symmetries, a.families, a.shift_families, a.limits) == (
        b.scale_symmetries, b.families, b.shift_families, b.limits,
    )  # fmt: skip


def test_inputs_of_inference_mode_and_such_that_require_grad() -> None:
    net, x = _net(), torch.randn(5, 3)
    found = audit(net, x)
    with torch.inference_mode():
        made_there: Tensor = x.clone()
        assert _same(audit(net, made_there), found)
    leaf = x.clone().requires_grad_()
    for given in (made_there, leaf):
        assert _same(audit(net, given), found)
        torch.testing.assert_close(shifted(net, audit(net, given))(x), net(x))
    assert leaf.grad is None


@pytest.mark.parametrize("rewrite", [fold, equalize])
def test_models_that_were_made_there_are_rewritten_outside(rewrite):
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    x = torch.randn(7, 4)
    found = rewrite(model, x).model
    with torch.no_grad():  # the model's own tensors know no gradients
        assert torch.allclose(found(x), model(x), atol=1e-5)


class _Encoder(nn.Module):
    """Attention, norms and linear layers: operations that are made of others."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(x + self.attention(x, x, x)[0])))


class _WithoutGradients(_Encoder):
    mode: Any = torch.no_grad

    def forward(self, x: Tensor) -> Tensor:
        with self.mode():
            return super().forward(x)


class _InInferenceMode(_WithoutGradients):
    mode: Any = torch.inference_mode


def test_a_forward_in_inference_mode_is_audited_as_one_without_gradients() -> None:
    x = torch.randn(4, 5, 8)
    found = []
    for kind in (_InInferenceMode, _WithoutGradients):
        torch.manual_seed(0)
        net = kind().eval()
        found.append(audit(net, x))
        rescaled(net, found[-1])(x)
    assert not found[0].unknown_ops
    assert found[0].families
    assert _same(*found)


def test_a_forward_in_inference_mode_can_be_folded() -> None:
    class InInferenceMode(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            with torch.inference_mode():
                return super().forward(x)

    torch.manual_seed(0)
    x = torch.randn(5, 3)
    net = InInferenceMode(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    folded = fold(net, x)
    assert [f.kind for f in folded.report.folded] == ["batchnorm"]
    torch.testing.assert_close(folded.model(x), net(x))
