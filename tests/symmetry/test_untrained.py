"""What weight decay does to weights that share a scale with what does not train."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.func import functional_call
from torch.nn.utils import prune

import onsphere as osp
from onsphere.symmetry import Audit, Kind
from onsphere.symmetry.claims import EFFECT_OF_DECAY

PENALTY = EFFECT_OF_DECAY[Kind.TIED]


class ConvNet(nn.Sequential):
    """A convolution, a BatchNorm and a head; the statistics may stay still in training."""

    def __init__(self, frozen: bool) -> None:
        super().__init__(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(4, 3),
        )  # fmt: skip
        self.frozen = frozen
        self[1].running_mean.uniform_(-0.1, 0.1)
        self[1].running_var.uniform_(0.5, 1.5)

    def train(self, mode: bool = True) -> "ConvNet":
        super().train(mode)
        if self.frozen:
            self[1].eval()
        return self


class Fused(nn.Module):
    """One map, half of which is rectified and read by the first of two others."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(4, 8, bias=False)
        self.middle = nn.Linear(4, 6, bias=False)
        self.last = nn.Linear(6, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.both(x).chunk(2, dim=-1)
        return self.last(self.middle(a.relu()).relu()) + torch.tanh(b).sum(-1, keepdim=True)


def linears(*frozen: int) -> nn.Sequential:
    net = nn.Sequential(
        nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 6, bias=False), nn.ReLU(),
        nn.Linear(6, 3),
    )  # fmt: skip
    for i in frozen:
        net[i].requires_grad_(False)
    return net


def images() -> Tensor:
    return 2 * torch.randn(40, 2, 6, 6)


def rows() -> Tensor:
    return torch.randn(60, 4)


def normed(*frozen: str) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    for name in frozen or ("weight", "bias"):
        net[1].get_parameter(name).requires_grad_(False).uniform_(0.5, 1.0)
    return net


def biased() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    net[0].bias.requires_grad_(False)
    return net


def no_bias() -> nn.Sequential:
    net = nn.Sequential(
        nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3, affine=False), nn.Linear(3, 5)
    ).eval()
    net[1].running_mean.uniform_(0.5, 1.0)
    net[2].bias.requires_grad_(False)
    return net


def pruned_bias() -> nn.Sequential:
    net = nn.Sequential(
        nn.Linear(4, 3), nn.BatchNorm1d(3, affine=False), nn.ReLU(), nn.Linear(3, 5)
    ).eval()
    net[1].running_mean.uniform_(0.1, 0.2)
    prune.custom_from_mask(net[0], "bias", torch.tensor([1.0, 0.0, 0.0]))
    return net


def two_norms() -> nn.Sequential:
    net = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False), nn.LayerNorm(6), nn.Linear(6, 3)
    ).eval()
    net[1].running_mean.uniform_(0.5, 1.0)
    return net


def frozen_batch_norm() -> nn.Sequential:
    net = ConvNet(True).train()
    net[0].bias = None
    for p in net[1].requires_grad_(False).parameters():
        p.uniform_(0.5, 1.0)
    return net


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], set[str]]] = {
    "BatchNorm in training": (lambda: ConvNet(False), images, set()),
    "BatchNorm in evaluation": (lambda: ConvNet(False).eval(), images, set()),
    "BatchNorm kept in evaluation": (lambda: ConvNet(True).train(), images, set()),
    "BatchNorm all frozen": (frozen_batch_norm, images, {"0.weight", "5.weight"}),
    "nothing frozen": (linears, rows, set()),
    "the first frozen": (lambda: linears(0), rows, set()),
    "the middle frozen": (lambda: linears(2), rows, set()),
    "two frozen": (lambda: linears(2, 4), rows, {"0.weight"}),
    "a norm's gain and bias frozen": (normed, rows, {"2.weight"}),
    "a norm's bias frozen": (lambda: normed("bias"), rows, set()),
    "no bias beside the running mean trains": (no_bias, rows, {"0.weight", "2.weight"}),
    "a bias beside the running mean is pruned": (
        pruned_bias, rows, {"0.weight", "0.bias_orig", "3.weight"},
    ),
    "a bias makes up for the running mean": (two_norms, rows, {"0.bias"}),
    "a bias in front of a ReLU frozen": (biased, rows, {"0.weight", "2.weight"}),
}  # fmt: skip


def audited(case: str) -> tuple[nn.Module, Tensor, Audit, set[str]]:
    torch.manual_seed(0)
    make, draw, penalized = CASES[case]
    net, x = make(), draw()
    return net, x, osp.audit(net, x), penalized


def rescaled_by_training(net: nn.Module, x: Tensor) -> set[str]:
    """Return the matrices that some direction scales as a whole while the function stays.

    Directions are the null space of the Jacobian of the outputs by all that trains, in float64.
    """
    net = net.double()
    trained = {n: p.detach() for n, p in net.named_parameters() if p.requires_grad}

    def outputs(*weights: Tensor) -> Tensor:
        return functional_call(
            net, dict(zip(trained, weights, strict=True)), (x.double(),)
        ).reshape(-1)

    blocks = jacobian(outputs, tuple(trained.values()))
    slopes = torch.cat([b.reshape(len(b), -1) for b in blocks], 1)
    _, sizes, directions = torch.linalg.svd(slopes, full_matrices=True)
    free = directions[int((sizes > 1e-5 * sizes[0]).sum()) :]
    assert len(free) < 40
    split = free.split([t.numel() for t in trained.values()], 1)
    return {
        n
        for (n, t), moved in zip(trained.items(), split, strict=True)
        if t.ndim > 1 and float(_distance(t.reshape(-1), moved)) < 1e-4 * float(t.norm())
    }


def _distance(weight: Tensor, directions: Tensor) -> Tensor:
    """Return how far a weight is from the span of directions."""
    if len(directions) == 0:
        return weight.norm()
    amounts = torch.linalg.lstsq(directions.T, weight[:, None], driver="gelsd").solution
    return (directions.T @ amounts - weight[:, None]).norm()


@pytest.mark.parametrize("case", CASES)
def test_decay_penalizes_what_only_buffers_and_frozen_weights_could_make_up_for(case: str) -> None:
    _, _, found, penalized = audited(case)
    assert {n for n, kind in found.kinds.items() if kind is Kind.TIED} == penalized
    assert {n for n in found.parameters if found.decay_of(n) == PENALTY} == penalized


@pytest.mark.parametrize("case", CASES)
def test_training_can_rescale_the_weights_that_it_is_said_to(case: str) -> None:
    net, x, found, _ = audited(case)
    for p in net.parameters():
        if p.ndim == 1 and p.requires_grad:
            nn.init.uniform_(p, 0.2, 0.5)  # zeros have no scale to move
    free = {Kind.SPHERE, Kind.SHARED, Kind.TRADED, Kind.INERT}
    said = {n for n, kind in found.kinds.items() if kind in free and net.get_parameter(n).ndim > 1}
    assert rescaled_by_training(net, x) == said


@pytest.mark.parametrize(("still", "change"), [(True, 0.02), (False, 1e-3)])
def test_decay_steps_change_the_output_of_a_frozen_batch_norm(still: bool, change: float) -> None:
    torch.manual_seed(0)
    net, x = ConvNet(still).train(), images()
    optimizer = torch.optim.SGD(net[0].parameters(), lr=0.1, weight_decay=0.1)
    before = net(x)
    (0.0 * before.sum()).backward()
    before = before.detach()
    for _ in range(100):
        optimizer.step()
    moved = float((net(x).detach() - before).norm() / before.norm())
    assert (moved > change) is still
    effect = EFFECT_OF_DECAY[Kind.TRADED if still else Kind.SPHERE]
    assert osp.audit(net, x).decay_of("0.weight") == effect


def test_what_a_weight_is_tied_to_is_always_named() -> None:
    """Also where a shift would make up for it, but through a weight that is not there."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False),
        nn.ReLU(), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU6(), nn.Linear(6, 3),
    )  # fmt: skip
    x = torch.randn(16, 4)
    net(x)
    advice = " ".join(osp.audit(net.eval(), x).advice())
    assert "only together with frozen weights or buffers (3.running_mean): weight" in advice


def test_all_that_is_said_agrees(tmp_path) -> None:
    _, _, found, _ = audited("BatchNorm all frozen")
    said = str(found).replace("\n      ", " ")
    assert "penalizes nothing" not in said
    assert "buffers could make up for it), on 2 weights: {0,5}.weight" in said
    assert "only together with frozen weights or buffers (" in said
    assert Audit.from_json(found.to_json(tmp_path / "audit.json")).kinds == found.kinds
    assert found.advice_on("0.weight") == "decay it only if a smaller scale is wanted"
    assert PENALTY in found.to_html(tmp_path / "audit.html").read_text()


def test_frozen_weights_are_not_decayed(tmp_path) -> None:
    net, _, found, _ = audited("two frozen")
    assert found.frozen == ["2.weight", "4.weight", "4.bias"]
    assert "does nothing, as these are frozen, to 3 weights" in str(found)
    assert Audit.from_json(found.to_json(tmp_path / "audit.json")).kinds == found.kinds
    assert [r.decay for r in found.weight_reports(net)][1:] == [EFFECT_OF_DECAY[Kind.FROZEN]] * 3


def test_parts_of_weights_are_judged_alike() -> None:
    torch.manual_seed(0)
    net, x = Fused(), torch.randn(6, 4)
    assert osp.audit(net, x).free_parts == {"both.weight": 0.5}
    net.middle.requires_grad_(False)  # all of the half still trades with the last map
    found = osp.audit(net, x)
    assert found.free_parts == {"both.weight": 0.5}
    assert found.kinds["last.weight"] is Kind.TRADED
    assert found.decay_of("both.weight") == EFFECT_OF_DECAY[Kind.PARTLY]
    net.last.requires_grad_(False)
    found = osp.audit(net, x)
    assert found.free_parts == {}
    assert found.decay_of("both.weight") == EFFECT_OF_DECAY[Kind.FIXED]


def test_what_shrinks_while_a_bias_makes_up_for_a_buffer_is_no_rescaling() -> None:
    _, _, found, _ = audited("a bias makes up for the running mean")
    assert found.kinds["0.weight"] is Kind.SHARED
    traded = {n for n, kind in found.kinds.items() if kind is Kind.TRADED}
    assert traded == {"2.weight", "2.bias", "3.weight"}


def test_those_are_named_that_a_weight_is_tied_to() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*linears(2, 4), nn.ReLU(), nn.Linear(3, 4), nn.BatchNorm1d(4))
    found = osp.audit(net.eval(), rows())
    assert found.kinds["0.weight"] is Kind.TIED
    assert "7.running_var" not in " ".join(found.advice()).partition("only together with")[2]
