"""The canonical form of models: the function stays, twice is once, the norm never grows."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from onsphere.symmetry import Audit, CanonicalizeError, audit, canonicalize
from onsphere.symmetry.rewrite.canonicalize import TOLERANCES
from symmetry.networks import Case as RandomCase
from symmetry.networks import random_network
from symmetry.oracle import count_wrong


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(build: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    """Build a network with weights of very different sizes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = build().to(dtype)
        with torch.no_grad():
            for i, p in enumerate(net.parameters()):
                p.mul_((1.7, 0.4, 5.3)[i % 3])
    return net


class Attention(nn.Module):
    """Softmax attention, with scores in float32 whatever the weights are; an output gain."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(6, 6, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x).float() @ self.k(x).float().transpose(-1, -2)
        return self.o(scores.softmax(-1).to(x.dtype) @ self.v(x))


class Tied(nn.Module):
    """An embedding whose table is the head as well, around a pre-norm block."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6, padding_idx=0)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.norm, self.last = nn.LayerNorm(6), nn.LayerNorm(6)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + self.down(F.relu(self.up(self.norm(x))))
        return F.linear(self.last(x), self.table.weight)


class LowRank(nn.Module):
    """A layer with a low-rank change whose second factor is still 0."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 6)
        self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)
        self.out = nn.Linear(6, 3)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.base(x) + self.up(self.down(x))))


class Autocast(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.inner(x).float()


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3))


def conv() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6),
        nn.ReLU(), nn.Flatten(), nn.Linear(96, 8), nn.ReLU(), nn.Linear(8, 3),
    )  # fmt: skip


def shared_statistics() -> nn.Sequential:
    net = conv()
    net[3], net[4] = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
    net[4].running_mean, net[4].running_var = net[1].running_mean, net[1].running_var
    net[7] = nn.Linear(128, 8)
    return net


def used_twice() -> nn.Sequential:
    layer = nn.Linear(6, 6)
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), layer, nn.ReLU(), layer, nn.Linear(6, 2))


def frozen() -> nn.Sequential:
    net = mlp()
    net[0].requires_grad_(False)
    return net


def strided() -> nn.Sequential:
    net = mlp()
    net[0].weight = nn.Parameter(_normal(6, 8).t())
    net[2].weight = nn.Parameter(_normal(7, 16)[:, ::2])
    return net


def weight_normed() -> nn.Sequential:
    net = mlp()
    parametrizations.weight_norm(net[0])
    parametrizations.spectral_norm(net[2])
    return net


X, IMAGES = _normal(5, 6), _normal(4, 3, 8, 8)


@dataclass(frozen=True)
class Case:
    """A network; ``moves`` says whether its norm can become smaller."""

    name: str
    build: Callable[[], nn.Module]
    x: Tensor = X
    train: bool = True
    moves: bool = True


CASES = (
    Case("mlp", mlp),
    Case("attention", Attention, _normal(2, 4, 6)),
    Case("batch norm", conv, IMAGES),
    Case("batch norm, eval", conv, IMAGES, train=False),
    Case("shared statistics", shared_statistics, IMAGES, train=False),
    Case("tied", Tied, torch.arange(8).reshape(2, 4)),
    Case("a weight of zero", LowRank),
    Case("used twice", used_twice),
    Case("frozen", frozen),
    Case("strided", strided),
    Case("parametrized", weight_normed),
    Case("autocast", lambda: Autocast(mlp())),
    Case("nothing to trade", lambda: nn.Sequential(nn.Linear(6, 4), nn.GELU()), moves=False),
)


@cache
def audited(name: str) -> Audit:
    """Audit a case once: the symmetries of a model do not depend on its type."""
    case = next(c for c in CASES if c.name == name)
    return audit(made(case.build).train(case.train), case.x)


def cast(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def total_norm(model: nn.Module) -> float:
    return sum(float(p.detach().double().norm()) ** 2 for p in model.parameters()) ** 0.5


def run(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """Evaluate a copy, so that running statistics stay."""
    torch.manual_seed(0)
    with torch.no_grad():
        return copy.deepcopy(model)(*args, **kwargs)


def change(model: nn.Module, other: nn.Module, *args: Any, **kwargs: Any) -> float:
    before, after = run(model, *args, **kwargs), run(other, *args, **kwargs)
    return float((before - after).abs().max() / before.abs().max())


def same_tensors(model: nn.Module, other: nn.Module) -> bool:
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


def shrinks(model: nn.Module, other: nn.Module) -> bool:
    return total_norm(other) < 0.999 * total_norm(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_the_function_stays_twice_is_once_and_the_norm_never_grows(
    case: Case, dtype: torch.dtype
) -> None:
    net, x = made(case.build, dtype).train(case.train), cast(case.x, dtype)
    if dtype == torch.bfloat16 and case.name == "parametrized":
        pytest.skip("the power iteration of spectral_norm needs float32")
    before = copy.deepcopy(net)
    once = canonicalize(net, audited(case.name), x)
    assert same_tensors(net, before)
    assert [p.requires_grad for p in once.parameters()] == [
        p.requires_grad for p in net.parameters()
    ]
    assert change(net, once, x) <= TOLERANCES[dtype]
    tensors = canonicalize(net, audited(case.name), x, channels=False)
    assert total_norm(once) <= total_norm(tensors) * (1 + torch.finfo(dtype).eps)
    assert total_norm(tensors) <= total_norm(net) * (1 + 1e-12)
    assert shrinks(net, once) == shrinks(net, tensors) == case.moves
    for form, channels in ((once, True), (tensors, False)):
        again = canonicalize(form, audited(case.name), x, channels=channels)
        assert same_tensors(again, form)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_powers_of_two_keep_every_bit(case: Case) -> None:
    net, found = made(case.build).train(case.train), audited(case.name)
    once = canonicalize(net, found, factors="binary")
    assert torch.equal(run(net, case.x), run(once, case.x))
    assert shrinks(net, once) == case.moves
    assert same_tensors(canonicalize(once, found, factors="binary"), once)


@pytest.mark.parametrize("build", [mlp, Tied, conv], ids=["mlp", "tied", "conv"])
def test_every_network_on_the_orbit_has_the_same_canonical_form(build: Any) -> None:
    x = {mlp: X.double(), Tied: torch.arange(8).reshape(2, 4), conv: IMAGES.double()}[build]
    net = made(build, torch.float64).eval()
    found = audit(net, x)
    other = copy.deepcopy(net)
    tensors = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    with torch.no_grad():
        for i, v in enumerate(found.exact_symmetries):
            for n, e in v.items():
                tensors[n].mul_((1.3 + i) ** float(e))
    one, two = (canonicalize(net, found, modes="audited") for net in (net, other))
    for p, q in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=0)


def test_traded_pairs_are_balanced() -> None:
    net = made(mlp, torch.float64)
    balanced = canonicalize(net, audit(net, X.double()))
    into = balanced[0].weight.square().sum() + balanced[0].bias.square().sum()
    middle = balanced[2].weight.square().sum() + balanced[2].bias.square().sum()
    torch.testing.assert_close(middle, balanced[4].weight.square().sum())
    torch.testing.assert_close(into + balanced[2].bias.square().sum(), middle)


def test_a_trade_against_zero_and_inert_weights_stay() -> None:
    net = made(LowRank, torch.float64)
    once = canonicalize(net, audit(net, X.double()))
    product = net.down.weight.norm() / net.base.weight.norm()
    assert torch.equal(once.up.weight, net.up.weight)
    assert torch.isclose(once.down.weight.norm(), net.down.weight.norm()), product
    net = made(conv, torch.float64)
    found = audit(net, IMAGES.double())
    assert set(found.inert) == {"0.bias", "3.bias"}
    once = canonicalize(net, found)
    assert torch.equal(once[0].bias, net[0].bias)


def test_a_model_that_rounds_inside_moves_by_powers_of_two_there_only() -> None:
    net, x = made(Attention, torch.float64), _normal(2, 4, 6).double()
    found = audit(net, x)
    once = canonicalize(net, found)
    after = dict(once.named_parameters())
    octaves = {n: (after[n] / p).detach().log2() for n, p in net.named_parameters()}
    q, k, v = (octaves[f"{n}.weight"] for n in "qkv")
    assert torch.equal(q, -k[:, :1].expand_as(q))
    assert torch.equal(q, q.round())
    assert bool(q.any())
    assert not torch.allclose(v, v.round())
    with pytest.raises(CanonicalizeError, match="factors='binary' does not round"):
        canonicalize(net, found, factors="real")
    canonicalize(net, found, factors="real", tolerance=1e-6)


# --- the other mode -----------------------------------------------------------------------------


def settled_conv(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return a network whose running statistics are those of the images."""
    net = made(conv, dtype)
    for _ in range(200):
        net(IMAGES.to(dtype))
    return net


@pytest.mark.parametrize("train", [False, True])
def test_the_function_stays_in_training_mode_and_in_evaluation_mode(train: bool) -> None:
    net, x = settled_conv().train(train), IMAGES.double()
    once = canonicalize(net, audit(net, x))
    assert shrinks(net, once)
    assert once.training == train
    for mode in (True, False):
        assert change(net.train(mode), once.train(mode), x) < 1e-12, mode


def test_a_fine_tuning_begins_where_it_began() -> None:
    net, x = settled_conv().eval(), IMAGES.double()
    once = canonicalize(net, audit(net, x)).train()
    statistics = run_and_keep(net.train(), x), run_and_keep(once, x)
    before, after = ([b for n, b in s.items() if "running" in n] for s in statistics)
    ratios = [(q / p) for p, q in zip(before, after, strict=True)]
    for ratio in ratios:  # a running statistic still estimates what the batch has
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
    assert change(net.eval(), once.eval(), x) < 1e-6


def run_and_keep(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Run in training mode; return the buffers as the run left them."""
    with torch.no_grad():
        net(x + 0.1)
    return dict(net.named_buffers())


def test_the_audited_mode_alone_is_kept_when_asked() -> None:
    net, x = settled_conv().eval(), IMAGES.double()
    found = audit(net, x)
    both, alone = canonicalize(net, found), canonicalize(net, found, modes="audited")
    assert total_norm(alone) < total_norm(both)
    assert change(net, alone, x) < 1e-12
    assert change(net.train(), alone.train(), x) > 1e-3


class OnlyInEvaluation(nn.Module):
    """A network that the other mode shows to be another one."""

    def __init__(self, refuses: bool) -> None:
        super().__init__()
        self.net, self.refuses = mlp(), refuses

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.net(x)
        if self.refuses:
            raise ValueError("no training here")
        return self.net[4](F.gelu(self.net[2](F.gelu(self.net[0](x)))))


def test_what_the_other_mode_does_not_have_stays_or_is_said() -> None:
    net = made(lambda: OnlyInEvaluation(refuses=False)).eval()
    found = audit(net, X)
    assert same_tensors(canonicalize(net, found), net)
    assert shrinks(net, canonicalize(net, found, modes="audited"))
    net.refuses = True
    with pytest.raises(CanonicalizeError, match="train mode, where the model does not run"):
        canonicalize(net, found)
    assert not net.training


def test_a_radius_without_a_sphere_is_said() -> None:
    net = made(mlp)
    with pytest.warns(UserWarning, match="no weight is on a sphere of its own in both modes"):
        canonicalize(net, audit(net, X), radius="unit")


# --- spheres of their own ---------------------------------------------------------------------


def test_the_radius_is_reached_or_refused_by_name() -> None:
    net, x = made(conv, torch.float64), IMAGES.double()
    found = audit(net, x)
    with pytest.raises(CanonicalizeError, match=r"an eps notices the length of '\d.weight'"):
        canonicalize(net, found, radius="unit")
    unit = canonicalize(net, found, radius="unit", tolerance=1e-2)
    fan_in = canonicalize(net, found, radius="fan_in", tolerance=1e-2)
    for layer, size in ((0, 27), (3, 72)):
        rows = unit[layer].weight.flatten(1).norm(dim=1)
        torch.testing.assert_close(rows, torch.ones_like(rows))
        rows = fan_in[layer].weight.flatten(1).norm(dim=1)
        torch.testing.assert_close(rows, torch.full_like(rows, size**0.5))
    assert 1e-9 < change(net, unit, x) <= 1e-2
    assert same_tensors(canonicalize(unit, found, radius="unit", tolerance=1e-2), unit)


@pytest.mark.parametrize(("train", "bias"), [(True, False), (True, True), (False, False)])
def test_running_statistics_move_along_with_each_filter(train: bool, bias: bool) -> None:
    net, x = made(conv, torch.float64), IMAGES.double()
    if not bias:
        net[0].bias = net[3].bias = None
    for _ in range(200):  # until the statistics are those of this batch
        net(x)
    net.train(train)
    found = audit(net, x)
    unit = canonicalize(net, found, radius="unit", modes="audited", tolerance=1e-2)
    scale = 1 / net[0].weight.detach().flatten(1).norm(dim=1)
    torch.testing.assert_close(unit[1].running_mean, net[1].running_mean * scale)
    if not train:  # there the gain is on a sphere as well, and the variance follows both
        scale = scale / net[1].weight.detach().abs()
    torch.testing.assert_close(unit[1].running_var, net[1].running_var * scale**2)
    assert change(net.eval(), unit.eval(), x) < 1e-3


def test_a_sphere_beside_no_eps_takes_any_radius() -> None:
    net = made(weight_normed, torch.float64)
    unit = canonicalize(net, audit(net, X.double()), radius="unit")
    rows = unit[0].parametrizations.weight.original1.norm(dim=1)
    torch.testing.assert_close(rows, torch.ones_like(rows))
    assert change(net, unit, X.double()) < 1e-12


def test_a_vector_of_zeros_stays_zero() -> None:
    net = made(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), torch.float64)
    with torch.no_grad():
        net[0].weight[1] = 0
    unit = canonicalize(net, audit(net, IMAGES.double()), radius="unit", tolerance=1e-2)
    rows = unit[0].weight.flatten(1).norm(dim=1)
    torch.testing.assert_close(rows, torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64))


def test_scales_beside_an_eps_trade_when_asked() -> None:
    def net_with_eps() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.LayerNorm(6))

    net, x = made(net_with_eps, torch.float64), X.double()
    found = audit(net, x)
    once = canonicalize(net, found, exact=False, tolerance=1e-3)
    assert total_norm(once) < total_norm(canonicalize(net, found)) <= total_norm(net)
    assert 0 < change(net, once, x) <= 1e-3


# --- where it happens -------------------------------------------------------------------------


def test_in_place_changes_this_model() -> None:
    net = made(mlp)
    found = audit(net, X)
    expected = canonicalize(net, found)
    first = net[0].weight
    assert canonicalize(net, found, inplace=True) is net
    assert net[0].weight is first
    assert same_tensors(net, expected)


def test_a_failure_half_way_leaves_the_model_as_it_was() -> None:
    net = made(mlp)
    found = audit(net, X)
    net[2].bias = nn.Parameter(torch.ones(1).expand(7))  # memory that refuses to be written
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match="single memory location"):
        canonicalize(net, found, inplace=True)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


@pytest.mark.parametrize("inplace", [False, True])
def test_what_cannot_be_verified_is_refused(inplace: bool, tmp_path: Path) -> None:
    net = made(conv)
    found = audit(net, IMAGES)
    before = copy.deepcopy(net)
    wrong = replace(found, exact_symmetries=[{"9.weight": Fraction(1), "7.weight": Fraction(-2)}])
    found.to_json(tmp_path / "audit.json")
    read = Audit.from_json(tmp_path / "audit.json")
    for bad, words in ((wrong, "output would change"), (read, "give `args`")):
        with pytest.raises(CanonicalizeError, match=words):
            canonicalize(net, bad, inplace=inplace, modes="audited")
    with pytest.raises(CanonicalizeError, match="got Audit and Sequential"):
        canonicalize(found, net, inplace=inplace)
    with pytest.raises(CanonicalizeError, match="eval mode"):
        canonicalize(net.eval(), found, inplace=inplace)
    with pytest.raises(CanonicalizeError, match=r"'0.weight' with shape \(8, 3, 3, 3\)"):
        canonicalize(mlp(), found, inplace=inplace)
    with pytest.raises(CanonicalizeError, match="meta device"):
        canonicalize(copy.deepcopy(net.train()).to("meta"), found, inplace=inplace)
    with torch.no_grad():
        poisoned = copy.deepcopy(net)
        poisoned[7].weight[0, 0] = float("nan")
    with pytest.raises(CanonicalizeError, match=r"'7.weight' holds NaN"):
        canonicalize(poisoned, found, inplace=inplace)
    assert same_tensors(net, before)
    assert same_tensors(canonicalize(net, read, IMAGES), canonicalize(net, found))


# --- networks that nobody chose ---------------------------------------------------------------


def keeps_its_function(seed: int, net: nn.Module, x: tuple[Tensor, ...], found: Any) -> bool:
    """Check the canonical form of a network; return whether it moved."""
    try:
        once, factors = canonicalize(net, found), "auto"
    except CanonicalizeError:  # a norm divides by rounding errors
        once, factors = canonicalize(net, found, factors="binary"), "binary"
    tensors = canonicalize(net, found, channels=False, factors=factors, tolerance=1e-6)
    assert change(net, once, *x) <= 1e-12, seed
    assert total_norm(once) <= total_norm(tensors) * (1 + 1e-12), seed
    assert total_norm(tensors) <= total_norm(net) * (1 + 1e-12), seed
    again = canonicalize(once, found, factors=factors, tolerance=1e-6)
    assert same_tensors(again, once), seed
    return not same_tensors(net, once)


def check_random_network(seed: int) -> bool:
    net, x = random_network(seed)
    return keeps_its_function(seed, net, x, audit(net, x))


@pytest.mark.parametrize(
    ("judged", "made_canonical", "least"),
    [(12, 8, 3), pytest.param(30, 20, 8, marks=pytest.mark.slow)],
)
def test_random_networks_have_right_claims_and_keep_their_function(
    judged: int, made_canonical: int, least: int
) -> None:
    """Claim nothing false, miss nothing, and compute the same in canonical form, by one audit."""
    reports: list[str] = []
    moved: dict[int, bool] = {}

    def canonical(seed: int, case: RandomCase, found: Any) -> None:
        if seed < made_canonical:
            moved[seed] = keeps_its_function(seed, case.net, case.args, found)

    networks, false, missed = count_wrong(
        range(judged), lambda s, m: reports.append(f"{s}: {m}"), heard=canonical
    )
    print(f"{networks} networks, {false} with a false claim, {missed} with one missed; {reports}")
    assert false == 0
    assert missed == 0
    moved |= {
        seed: check_random_network(seed) for seed in set(range(made_canonical)) - moved.keys()
    }
    assert sum(moved.values()) > least


@pytest.mark.slow
def test_many_random_networks_keep_their_function() -> None:
    assert sum(check_random_network(seed) for seed in range(1000, 1500)) > 200


FAMILIES = ("llama", "gptj", "cohere", "mamba", "deberta-v2", "mobilenet-v2", "wav2vec2")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.slow
def test_families_of_transformers(name: str, dtype: torch.dtype) -> None:
    pytest.importorskip("transformers")
    from benchmarks.families import FAMILIES as families

    family = next(f for f in families if f.name == name)
    net, kwargs = family.build()
    found = audit(net, (), kwargs, output=family.output)
    net, kwargs = net.to(dtype), {k: cast(v, dtype) for k, v in kwargs.items()}
    once = canonicalize(net, found, (), kwargs, output=family.output)
    assert change_of(net, once, kwargs, family.output) <= TOLERANCES[dtype]
    assert shrinks(net, once) or name == "mamba"
    again = canonicalize(once, found, (), kwargs, output=family.output)
    assert same_tensors(again, once)


def change_of(model: nn.Module, other: nn.Module, kwargs: Any, output: Any) -> float:
    with torch.no_grad():
        before, after = output(model(**kwargs)), output(other(**kwargs))
    return float((before - after).abs().max() / before.abs().max())


class Adapted(nn.Module):
    """A frozen perceptron with a norm, and a trained adapter of low rank on each map."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.ModuleList([nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3)])
        self.down = nn.ModuleList(nn.Linear(n, 2, bias=False) for n in (5, 8))
        self.up = nn.ModuleList(nn.Linear(2, n, bias=False) for n in (8, 3))

    def forward(self, x: Tensor) -> Tensor:
        first, norm, last = self.base
        x = norm(first(x) + self.up[0](self.down[0](x))).relu()
        return last(x) + self.up[1](self.down[1](x))


def test_the_frozen_base_of_an_adapter_stays() -> None:
    net, x = made(Adapted, torch.float64), _normal(6, 5).double()
    net.base.requires_grad_(False)
    once = canonicalize(net, audit(net, x))
    stays = [n for n, p in once.named_parameters() if torch.equal(p, net.get_parameter(n))]
    assert stays == [n for n, _ in net.named_parameters() if n.startswith("base.")]
    assert torch.allclose(once(x), net(x), rtol=1e-10, atol=0)
    assert total_norm(once) < total_norm(net)
    twice = canonicalize(once, audit(once, x))
    assert all(map(torch.equal, twice.parameters(), once.parameters()))


def test_a_frozen_weight_keeps_its_length_on_its_sphere() -> None:
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Linear(6, 8, bias=False), nn.LayerNorm(8), nn.Linear(8, 5, bias=False),
            nn.LayerNorm(5),
        )  # fmt: skip

    net = made(build, torch.float64)
    net[0].requires_grad_(False)
    once = canonicalize(net, audit(net, X.double()), radius="unit", tolerance=1e-2)
    assert torch.equal(once[0].weight, net[0].weight)
    assert float(once[2].weight.norm().detach()) == pytest.approx(1)
    net[2].requires_grad_(False)
    with pytest.warns(UserWarning, match="no weight that trains is on a sphere"):
        canonicalize(net, audit(net, X.double()), radius="unit", tolerance=1e-3)


def test_frozen_weights_move_where_asked_and_where_nothing_trains() -> None:
    net, x = made(Adapted, torch.float64), _normal(6, 5).double()
    free = canonicalize(net, audit(net, x))
    assert not torch.equal(free.base[2].weight, net.base[2].weight)
    net.base.requires_grad_(False)
    asked = canonicalize(net, audit(net, x), frozen=True)
    net.requires_grad_(False)
    still = canonicalize(net, audit(net, x))
    assert all(map(torch.equal, asked.parameters(), free.parameters()))
    assert all(map(torch.equal, still.parameters(), free.parameters()))


def test_what_could_move_only_with_a_frozen_weight_stays() -> None:
    net = made(frozen, torch.float64)
    moved = canonicalize(net, audit(net, X.double()))
    stays = [torch.equal(moved[i].weight, net[i].weight) for i in (0, 2, 4)]
    assert stays == [True, False, False]
