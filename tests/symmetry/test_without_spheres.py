"""A model that has no weight on a sphere of its own: it is said once, and what can be done."""

import warnings

import pytest
import torch
from torch import Tensor, nn

import onsphere as osp
from onsphere.geometry import Sphere, VectorAxes


class Block(nn.Module):
    """Attention and a feed-forward part, each after a norm and beside a residual connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        scores = (self.q(h) @ self.k(h).transpose(1, 2)).softmax(-1)
        x = x + self.o(scores @ self.v(h))
        return x + self.down(torch.relu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A pre-norm transformer: joint spheres and trades, and no sphere of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 6)
        self.blocks = nn.ModuleList(Block(6) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 8, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@pytest.fixture(scope="module")
def audited() -> tuple[nn.Module, osp.Audit]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = GPT()
    return net, osp.audit(net, torch.arange(12).reshape(3, 4) % 8)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        ids = torch.randint(8, (4, 5), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(ids).flatten(0, 1), ids.flatten()).backward()
        optimizer.step()


FOUND = r"no weight of GPT is on a sphere of its own in train mode; .*joint.* in rescaling"


def test_groups_without_a_sphere_are_said_once(audited: tuple[nn.Module, osp.Audit]) -> None:
    net, audit = audited
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        optimizer = osp.optim.SphereAdamW(audit.param_groups(net), lr=1e-3)
        train(net, optimizer, 2)
    assert len(said) == 1
    assert said[0].filename == __file__
    with pytest.warns(UserWarning, match=FOUND):
        audit.spheres_of(net)


def test_on_sphere_takes_an_audit_and_says_what_it_found(
    audited: tuple[nn.Module, osp.Audit],
) -> None:
    net, audit = audited
    with pytest.warns(UserWarning, match=FOUND) as said:
        optimizer = osp.optim.on_sphere(torch.optim.AdamW(net.parameters()), audit)
    assert (len(said), optimizer.constrained) == (1, [])


def test_on_sphere_takes_an_audit_with_spheres() -> None:
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 2))
    audit = osp.audit(net, torch.randn(8, 3, generator=torch.Generator().manual_seed(0)))
    optimizer = osp.optim.on_sphere(torch.optim.SGD(net.parameters(), lr=0.1), audit)
    assert [held.params for held in optimizer.constrained] == [(net[0].weight,)]
    read = osp.Audit.from_dict(audit.to_dict())
    with pytest.raises(ValueError, match=r"give audit.spheres_of\(model\)"):
        osp.optim.on_sphere(torch.optim.SGD(net.parameters(), lr=0.1), read)


@pytest.mark.parametrize("kind", [osp.optim.SphereAdamW, osp.optim.SphereSGD])
def test_an_optimizer_that_was_told_of_no_sphere_says_so(kind: type) -> None:
    """As a trainer makes it, which writes the groups itself."""
    weight = nn.Parameter(torch.ones(2, 3))
    optimizer = kind([{"params": [weight], "weight_decay": 0.1}], lr=0.1)
    weight.grad = torch.ones(2, 3)
    with pytest.warns(UserWarning, match="no sphere in any param group, so it is torch.optim"):
        optimizer.step()
    optimizer.step()  # said once
    with pytest.warns(UserWarning, match="on_sphere was given no sphere"):
        osp.optim.on_sphere(torch.optim.SGD([weight], lr=0.1), [{"params": [weight]}])


def test_a_later_group_with_a_sphere_is_enough() -> None:
    weight, other = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3))
    optimizer = osp.optim.SphereSGD([other], lr=0.1)
    optimizer.add_param_group({"params": [weight], "sphere": Sphere()})
    weight.grad = torch.ones(2, 3)
    optimizer.step()


def test_only_embeddings_are_said() -> None:
    net = nn.Sequential(nn.Embedding(9, 4), nn.LayerNorm(4, elementwise_affine=False))
    audit = osp.audit(net, torch.arange(6).reshape(2, 3))
    with pytest.warns(
        UserWarning, match=r"only embeddings or heads.*\(0.weight\).*embeddings=True"
    ):
        audit.param_groups(net)
    assert audit.param_groups(net, embeddings=True)[0]["names"] == ["0.weight"]


def test_a_monitor_watches_all_matrices_instead(audited: tuple[nn.Module, osp.Audit]) -> None:
    net, audit = audited
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    with pytest.warns(UserWarning, match=FOUND):
        monitor = osp.Monitor(net, optimizer, audit, every=1)
    with monitor:
        train(net, optimizer, 5)
    matrices = [n for n, p in net.named_parameters() if p.ndim > 1]
    assert list(monitor.run.layers) == matrices
    assert monitor.flags == []
    assert "watched without being on spheres" in str(monitor)
    with osp.Monitor(net, optimizer, "matrices") as asked:
        assert list(asked.run.layers) == matrices


def test_weights_that_are_on_no_sphere_raise_one_flag(
    audited: tuple[nn.Module, osp.Audit],
) -> None:
    net, _ = audited
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    by_hand = {n: VectorAxes() for n, p in net.named_parameters() if p.ndim > 1}
    with osp.Monitor(net, optimizer, by_hand, every=1) as monitor:
        for _ in range(3):
            for p in net.parameters():
                p.grad = p.detach().clone()  # all along the weight
            optimizer.step()
    off = [flag for flag in monitor.flags if flag.kind == "eps"]
    assert len(off) == 1
    assert f"of {len(by_hand)} weights (table.weight, " in off[0].message
