"""What these inputs do not read, other inputs and later runs do: nothing may be claimed of it."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onsphere.symmetry import audit
from onsphere.symmetry.audit_result import Audit


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, dtype=torch.float64))


def holds(found: Audit, model: nn.Module, *inputs: Tensor) -> bool:
    """Put all families into practice, each channel by a power of two of its own."""
    before = model(*inputs)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    own = dict(model.named_parameters())
    for family in found.families:
        octaves = torch.randint(-2, 3, (family.count,), generator=generator).double()
        for name, logs in family.log_factors(octaves, shapes).items():
            own[name].data.mul_(2.0**logs)
    return torch.allclose(model(*inputs), before, rtol=1e-9)


class HeadsOfPositions(nn.Module):
    """Tokens are mixed by a matrix for each head, of which shorter inputs read a corner."""

    def __init__(self) -> None:
        super().__init__()
        self.w = weight(2, 12, 12)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        heads = x.unflatten(-1, (2, -1)).transpose(1, 2)
        return torch.einsum("hij,bhjd->bhid", self.w[:, :length, :length], heads)


class MatrixForEachToken(nn.Module):
    """Each token has a matrix of its own, of as many as there may be tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.o = weight(10, 6, 4), weight(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("btd,thd->bth", x, self.w[: x.shape[1]])
        return hidden.relu().sum(1) @ self.o


@pytest.mark.parametrize("net", [HeadsOfPositions, MatrixForEachToken])
def test_families_hold_for_longer_inputs(net: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = net()
    found = audit(model, torch.randn(2, 4, 4, dtype=torch.float64))
    assert holds(found, model, torch.randn(2, 10, 4, dtype=torch.float64))


def test_columns_of_a_table_of_positions_scale_in_all_of_its_rows() -> None:
    class Placed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.p, self.o = weight(4, 6), weight(10, 6), weight(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x @ self.a + self.p[: x.shape[1]]) @ self.o

    torch.manual_seed(0)
    model = Placed()
    found = audit(model, torch.randn(2, 4, 4, dtype=torch.float64))
    (family,) = found.families
    assert (family.count, set(family.names)) == (6, {"a", "p", "o"})
    assert holds(found, model, torch.randn(2, 10, 4, dtype=torch.float64))


class Masked(nn.Module):
    """Experts that a mask sends tokens to, all of them in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = weight(4, 6, 5), weight(4, 3, 6)

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        out = x.new_zeros(len(x), 3)
        for e in range(4):
            mine = chosen == e
            out[mine] = F.relu(x[mine] @ self.up[e].T) @ self.down[e].T
        return out


class MaskedModules(Masked):
    """The same, each a module."""

    def __init__(self) -> None:
        super().__init__()
        del self.up, self.down
        layers = ((nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)) for _ in range(4))
        self.experts = nn.ModuleList(nn.Sequential(*some) for some in layers).double()

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        out = x.new_zeros(len(x), 3)
        for e, expert in enumerate(self.experts):
            out[chosen == e] = expert(x[chosen == e])
        return out


@pytest.mark.parametrize("net", [Masked, MaskedModules])
def test_an_expert_that_no_mask_chose_is_neither_free_nor_inert(
    net: Callable[[], nn.Module],
) -> None:
    torch.manual_seed(0)
    model, x = net(), torch.randn(6, 5, dtype=torch.float64)
    found = audit(model, (x, torch.tensor([0, 1, 2, 0, 1, 2])))
    assert not found.inert
    assert sum(f.count for f in found.families) == 18
    assert holds(found, model, x, torch.tensor([0, 1, 2, 3, 3, 3]))


def test_a_counter_that_the_model_moves_masks_nothing_for_good() -> None:
    class Growing(nn.Module):
        step: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.a, self.o = nn.Linear(5, 8), nn.Linear(8, 3)
            self.register_buffer("step", torch.tensor(2))

        def forward(self, x: Tensor) -> Tensor:
            self.step += 1
            return self.o(torch.where(torch.arange(8) < self.step, F.relu(self.a(x)), 0.0))

    torch.manual_seed(0)
    (family,) = audit(Growing(), torch.randn(4, 5)).families
    assert (family.count, set(family.names)) == (8, {"a.weight", "a.bias", "o.weight"})


@pytest.mark.parametrize("table", [nn.Embedding, nn.EmbeddingBag])
def test_an_audit_leaves_a_table_with_max_norm_as_it_is(table: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(table(9, 6, max_norm=1.0), nn.Linear(6, 3))
    before = model[0].weight.detach().clone()
    audit(model, torch.randint(0, 9, (2, 4)))
    assert torch.equal(model[0].weight, before)


def test_positions_made_without_version_counters_pick_as_others_do() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.o = nn.Embedding(9, 6), nn.Linear(6, 3)

        @torch.inference_mode()
        def forward(self, x: Tensor) -> Tensor:
            return self.o(self.e(torch.arange(4).clone()) * x)

    torch.manual_seed(0)
    (family,) = audit(Frozen(), torch.randn(4, 1)).families
    assert (family.count, family.names) == (6, ("e.weight", "o.weight"))
