"""Models with pruned weights: copies compute the same, and masked entries stay away."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from onsphere import audit, canonicalize, equalize, fold
from onsphere.symmetry import rescaled


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3),
        nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 5),
    )  # fmt: skip


def _pruned() -> tuple[nn.Sequential, Tensor]:
    net, x = _network(), torch.randn(8, 3, 12, 12)
    prune.l1_unstructured(net[0], "weight", amount=0.5)
    prune.ln_structured(net[3], "weight", amount=0.25, n=2, dim=0)
    prune.random_unstructured(net[3], "weight", amount=0.1)
    prune.random_unstructured(net[9], "weight", amount=0.4)
    prune.random_unstructured(net[9], "bias", amount=0.4)
    net(x)  # what a hook computed has a graph behind it
    return net.eval(), x


REWRITES: dict[str, Callable[[nn.Module, Tensor, bool], Any]] = {
    "canonicalize": lambda net, x, own: canonicalize(net, audit(net, x), inplace=own),
    "equalize": lambda net, x, own: equalize(net, x, inplace=own).model,
    "equalize to the least norm": lambda net, x, own: (
        equalize(net, x, objective="norm", inplace=own).model
    ),
    "rescaled": lambda net, x, own: rescaled(net, audit(net, x)),
}


@pytest.mark.parametrize("own", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize("name", REWRITES)
def test_a_rewritten_pruned_network_computes_the_same(name: str, own: bool) -> None:
    net, x = _pruned()
    before, state = net(x), {n: t.clone() for n, t in net.state_dict().items()}
    done = REWRITES[name](net, x, own)
    kept = not own or name == "rescaled"
    assert (done is net) is not kept
    torch.testing.assert_close(done(x), before, rtol=1e-3, atol=1e-5)
    after = done.state_dict()
    assert after.keys() == state.keys()
    assert not torch.equal(after["3.weight_orig"], state["3.weight_orig"])
    assert all(torch.equal(after[n], t) for n, t in state.items() if n.endswith("_mask"))
    assert all(torch.equal(net.state_dict()[n], t) for n, t in state.items()) is kept
    twin, _ = _pruned()
    twin.load_state_dict(after)
    torch.testing.assert_close(twin(x), before, rtol=1e-3, atol=1e-5)
    done(x).square().sum().backward()
    assert done[3].weight_orig.grad is not None
    assert kept is (net[3].weight_orig.grad is None)


@pytest.mark.parametrize("own", [False, True], ids=["copy", "inplace"])
def test_folding_multiplies_masks_into_weights(own: bool) -> None:
    net, x = _pruned()
    before, weight = net(x), net[0].weight.detach().clone()
    done = fold(net, x, inplace=own)
    assert (done.model is net) is own
    torch.testing.assert_close(done.model(x), before, rtol=1e-3, atol=1e-5)
    plain, _ = _network().eval(), x
    plain[0], plain[1] = nn.Conv2d(3, 16, 3), nn.Identity()
    plain.load_state_dict(done.model.state_dict())
    torch.testing.assert_close(plain(x), before, rtol=1e-3, atol=1e-5)
    assert torch.equal(done.model[0].weight == 0, weight == 0)
    assert [p.name for p in done.report.folded if p.kind == "weight"] == [
        "0.weight", "3.weight", "9.weight", "9.bias",
    ]  # fmt: skip
    assert hasattr(net[0], "weight_mask") is not own


def test_pruned_weights_stay_where_they_are_not_to_be_folded() -> None:
    net, x = _pruned()
    done = fold(net, x, what=["batchnorm", "gain"])
    torch.testing.assert_close(done.model(x), net(x))
    assert [(p.name, p.into) for p in done.report.folded] == [("1", ("0.weight_orig",))]
    assert torch.equal(done.model[0].weight_mask, net[0].weight_mask)


def test_where_modules_stay_fold_says_how_to_make_pruned_weights_plain() -> None:
    net, x = _pruned()
    done = fold(net, x, keep_modules=True)
    torch.testing.assert_close(done.model(x), net(x))
    reasons = {p.name: p.reason for p in done.report.kept}
    assert "torch.nn.utils.prune.remove(module, 'weight') first" in reasons["0.weight"]


@pytest.mark.parametrize("dim", [0, None])
def test_a_pruned_part_of_a_computed_weight_is_folded(dim: int | None) -> None:
    torch.manual_seed(0)
    new = nn.utils.parametrizations.weight_norm(nn.Linear(5, 6), dim=dim)
    net, x = nn.Sequential(new, nn.ReLU(), nn.Linear(6, 2)), torch.randn(7, 5)
    prune.random_unstructured(net[0].parametrizations.weight, "original1", amount=0.3)
    before = net(x)
    done = fold(net, x).model
    torch.testing.assert_close(done(x), before)
    assert set(done.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_channels_are_equalized_by_the_entries_that_are_there() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(7, 5)
    mask = torch.ones(6, 5)
    mask[:, 0] = 0
    prune.custom_from_mask(net[0], "weight", mask)
    with torch.no_grad():
        net[0].weight_orig[:, 0] = 1e3 * torch.rand(6)
    done = equalize(net, x)
    done.model(x)
    sizes = done.model[0].weight.abs().amax(1), done.model[2].weight.abs().amax(0)
    torch.testing.assert_close(*sizes)
    assert all(w.spread[0] < 100 for w in done.report.weights)


def test_a_state_with_a_graph_is_copied() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.h = nn.Linear(5, 6), nn.Linear(6, 3)
            self.seen: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            y = self.f(x).relu()
            self.seen[:] = [y]
            return self.h(y)

    torch.manual_seed(0)
    net, x = Remembers(), torch.randn(7, 5)
    before = net(x)
    done = equalize(net, x).model
    torch.testing.assert_close(done(x), before)
