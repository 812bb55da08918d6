"""Copies moved along the families of an audit: what these name moves, and the function stays."""

import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from onsphere.symmetry import Audit, ShiftError, ShiftFamily, audit, shifted
from onsphere.symmetry.shifts.families import followed_shifts
from symmetry.networks import plain_case


class Small(nn.Module):
    """A map, a branch, a number and a vector; what is made of them is given."""

    def __init__(self, of: Callable[["Small", Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.l = nn.Linear(4, 4), nn.Linear(4, 4)
        self.c, self.p = nn.Parameter(torch.randn(1)), nn.Parameter(torch.randn(4))
        self.of = of

    def forward(self, x: Tensor) -> Tensor:
        return self.of(self, self.a(x))


def branch(s: Small, h: Tensor) -> Tensor:
    return h + s.l(h)


def centred(h: Tensor) -> Tensor:
    return (h - h.mean(0)).tanh()


SMALL: dict[str, Callable[[Small, Tensor], Tensor]] = {
    "a number behind the branch": lambda s, h: (branch(s, h) + s.c).softmax(-1),
    "a number before the branch": lambda s, h: branch(s, h + s.c).softmax(-1),
    "a number on both sides": lambda s, h: (branch(s, h + s.c) + s.c).softmax(-1),
    "a branch twice": lambda s, h: centred(branch(s, branch(s, h) + s.c)),
    "a number, centred": lambda s, h: centred(branch(s, h + s.c)),
    "a branch, centred": lambda s, h: centred(branch(s, h)),
    "in two rounds": lambda s, h: centred(branch(s, branch(s, h + s.c) + s.p)),
    "centred": lambda s, h: centred(h),
    "a vector before the branch": lambda s, h: branch(s, h + s.p).softmax(-1),
    "a vector in two orders": lambda s, h: ((h + s.p).flip(-1) + 2 * s.p).softmax(-1),
    "a mean before the branch": lambda s, h: (branch(s, h + s.p.mean()) + s.p).softmax(-1),
    "a branch added twice": lambda s, h: (branch(s, h) + s.l(h) + s.p).softmax(-1),
    "behind a nonlinearity": lambda s, h: (s.l(h).tanh() + s.p.mean() + s.c).softmax(-1),
    "a part": lambda s, h: branch(s, h + torch.cat([s.c + s.p[:1], s.p[1:]])).softmax(-1),
}


SHORTENED = {
    "a number before the branch", "a number on both sides", "a branch twice",
    "a number, centred", "in two rounds", "a mean before the branch",
}  # fmt: skip
"""Where an audit leaves moves out of families."""


def state(net: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach() for n, t in [*net.named_parameters(), *net.named_buffers()]}


def named(families: Sequence[ShiftFamily], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Which entries of each weight some move names."""
    found = {n: torch.zeros(t.shape, dtype=torch.bool) for n, t in own.items()}
    for m in (m for f in families for m in f.moves):
        found[m.name] |= m.places >= 0
    return found


def output(net: nn.Module, x: tuple[Tensor, ...]) -> Tensor:
    torch.manual_seed(0)
    return deepcopy(net)(*x).detach()


def is_even(net: nn.Module, x: tuple[Tensor, ...]) -> bool:
    """Whether the output stays where it is when all weights are off by rounding."""
    other = deepcopy(net)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1 + 1e-15 * torch.randn_like(p))
    return torch.allclose(output(other, x), output(net, x), rtol=1e-11, atol=1e-11)


def count_moved_as_told(net: nn.Module, found: Audit, xs: Sequence[tuple[Tensor, ...]]) -> int:
    """Check copies along each family and along all; return how many families there are."""
    own = state(net)
    for families in [*([f] for f in found.shift_families), found.shift_families]:
        twin = shifted(net, found, families) if families else net
        moved = {n: t != own[n] for n, t in state(twin).items()}
        expected = named(families, own)
        assert all(torch.equal(moved[n], expected[n]) for n in own)
        for x in xs:
            assert torch.allclose(output(twin, x), output(net, x), rtol=1e-10, atol=1e-10)
    return len(found.shift_families)


@pytest.mark.parametrize("name", SMALL)
def test_copies_along_each_family_and_along_all(name: str) -> None:
    torch.manual_seed(0)
    net = Small(SMALL[name]).double()
    x, y = torch.randn(2, 5, 4, dtype=torch.float64)
    found = audit(net, x)
    assert count_moved_as_told(net, found, [(x,), (y,)])
    told = {f.moves for f in found.shift_families}
    all_moves = {f.family.moves for f in followed_shifts(net, (x,))[1]}
    assert bool(told - all_moves) == (name in SHORTENED)


def test_what_is_added_is_what_the_moves_say() -> None:
    torch.manual_seed(0)
    net = Small(lambda s, h: branch(s, h - s.a.bias + s.c).softmax(-1)).double()
    found = audit(net, torch.randn(5, 4, dtype=torch.float64))
    (family,) = (f for f in found.shift_families if f.names == ("c", "l.bias"))
    assert [(m.name, m.factor, m.map) for m in family.moves] == [
        ("c", 1, ""), ("l.bias", -1, "l.weight @ v"),
    ]  # fmt: skip
    twin = shifted(net, found, family)
    added = {n: t - state(net)[n] for n, t in state(twin).items()}
    assert torch.allclose(added["l.bias"], -net.l.weight.sum(1) * added["c"])


# An audit leaves moves out of a family of the first, of the other with what maps make of amounts.
@pytest.mark.parametrize("seed", [2018, 2000])
def test_random_networks(seed: int) -> None:
    case = plain_case(seed)
    assert count_moved_as_told(case.net, audit(case.net, case.args), case.inputs)


@pytest.mark.slow
def test_many_random_networks() -> None:
    families = 0
    for seed in range(2000, 2040):
        case = plain_case(seed)
        xs = [x for x in case.inputs if is_even(case.net, x)]
        families += count_moved_as_told(case.net, audit(case.net, case.args), xs)
    assert families > 80


class Routed(nn.Module):
    """Experts, of which none runs that no input asks for."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.route, self.first = nn.Linear(4, experts), nn.Linear(4, 4)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        chosen, h = self.route(x).argmax(-1, keepdim=True), self.first(x)
        found = torch.zeros_like(h)
        for k, expert in enumerate(self.experts):
            if (chosen == k).any():
                found = torch.where(chosen == k, expert(h), found)
        return found.tanh()

    def asked(self, x: Tensor) -> set[int]:
        return {*self.route(x).argmax(-1).tolist()}


def test_what_only_further_inputs_of_the_audit_reach_moves_along() -> None:
    torch.manual_seed(1)
    net, x = Routed(2).double(), torch.randn(64, 4, dtype=torch.float64)
    found = audit(net, x[:1])
    assert net.asked(x[:1]) < set().union(*(net.asked(c.args[0]) for c in found.inputs.others))
    assert count_moved_as_told(net, found, [(x,)]) == 1


def test_what_the_weights_of_the_model_do_not_reach_is_said() -> None:
    torch.manual_seed(2)
    net, x = Routed(3).double(), torch.randn(64, 4, dtype=torch.float64)
    found = audit(net, x[:1])
    assert len(found.shift_families[0].names) == 4
    with pytest.raises(ShiftError, match="no input of its audit reaches all that moves"):
        shifted(net, found)
    assert count_moved_as_told(net, audit(net, x), [(x,)]) == 1


def test_another_model_is_refused() -> None:
    x = torch.randn(5, 4)
    one, other = (Small(SMALL[n]) for n in ("a vector before the branch", "centred"))
    with pytest.raises(ShiftError, match="not the audited one"):
        shifted(other, audit(one, x))


@pytest.mark.parametrize(
    ("to", "says"),
    [
        ("half", "on the inputs of this audit the model raised RuntimeError.*; audit it again$"),
        ("meta", "^this audit was made without memory; audit the model that is to be moved$"),
    ],
)
def test_an_audit_of_another_type_or_device_is_refused(to: str, says: str) -> None:
    net, x = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)), torch.randn(6, 4)
    other = deepcopy(net)
    found = audit(other.to("meta"), x.to("meta")) if to == "meta" else audit(net, x)
    with pytest.raises(ShiftError, match=says):
        shifted(net.half() if to == "half" else net, found)


def test_zeros_in_a_mask_hide_no_other_family() -> None:
    class Masked(nn.Module):
        def __init__(self, mask: Tensor) -> None:
            super().__init__()
            self.into, self.norm, self.out = nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)
            self.register_buffer("mask", mask)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.norm(self.into(x) * self.mask))

    both = {("into.bias",), ("norm.bias", "out.bias")}
    hidden = both - {("into.bias",)}
    for mask, families in (([1.0, 2, 1, 0.5, 1], both), ([1.0, 0, 1, 0, 1], hidden)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = audit(Masked(torch.tensor(mask)).eval(), torch.randn(6, 4))
        assert {f.names for f in found.shift_families} == families
