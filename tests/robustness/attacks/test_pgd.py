"""Attacks against closed forms on linear classifiers, and what they must leave alone."""

from functools import partial

import pytest
import torch

from onsphere.robustness import Threat, accuracy, cross_entropy, dlr, fgsm, margin, pgd

WIDE = (-100.0, 100.0)
DUAL = {"linf": 1, "l2": 2}
ATTACKS = {"fgsm": fgsm, "pgd": pgd}
CASES = [(norm, loss) for norm in DUAL for loss in ("cross_entropy", "dlr")]


@pytest.fixture
def problem(generator):
    """A linear classifier of 3 classes in float64, inputs, and the labels that it gives them."""
    net = torch.nn.Linear(8, 3).double()
    for param in net.parameters():
        param.data = torch.randn(param.shape, generator=generator, dtype=torch.float64)
    x = torch.rand(200, 8, generator=generator, dtype=torch.float64)
    return net, x, net(x).argmax(1)


def conv_net(generator):
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten(),
        torch.nn.Linear(4 * 16, 5),
    )  # fmt: skip
    for param in net.parameters():
        param.data = torch.randn(param.shape, generator=generator)
    x = torch.rand(100, 1, 6, 6, generator=generator)
    return net.eval(), x, net(x).argmax(1)


@pytest.mark.parametrize("norm", DUAL)
@pytest.mark.parametrize("eps", [0.05, 0.3])
@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_two_classes_have_a_closed_form(norm, eps, attack, problem, generator):
    net, x, _ = problem
    net.weight.data[2], net.bias.data[2] = 0, -1e4  # a class that is never reached
    y = net(x).argmax(1)
    attacked = attack(net, x, y, eps=eps, norm=norm, bounds=WIDE)
    slope = net.weight[0] - net.weight[1]
    worst = margin(net(x), y) - eps * torch.linalg.vector_norm(slope, DUAL[norm])
    assert torch.equal(net(attacked).argmax(1) == y, worst > 0)
    standing = worst > 0
    torch.testing.assert_close(margin(net(attacked), y)[standing], worst[standing])


@pytest.mark.parametrize("norm", DUAL)
def test_three_classes_against_the_exact_worst_case(norm, problem, generator):
    net, x, y = problem
    z, w = net(x).detach(), net.weight.detach()
    gaps = (w.unsqueeze(1) - w).norm(DUAL[norm], dim=2)
    reach = (z.gather(1, y[:, None]) - z) - 0.15 * gaps[y]
    robust = (reach > 0).sum(1) == 2  # the label's own entry is exactly 0
    settings = {"eps": 0.15, "norm": norm, "bounds": WIDE, "generator": generator}
    attacked = pgd(net, x, y, loss="dlr", restarts=5, **settings)
    stands = net(attacked).argmax(1) == y
    assert not (robust & ~stands).any()
    assert (stands & ~robust).sum() <= 2  # found by an ascent that may stop at the other class


@pytest.mark.parametrize(("norm", "loss"), CASES)
@pytest.mark.parametrize("attack", ATTACKS)
def test_constraints_modes_and_gradients_are_left_alone(norm, loss, attack, generator):
    net, x, y = conv_net(generator)
    for param in net.parameters():
        param.grad = torch.ones_like(param)
    before, state = x.clone(), {k: v.clone() for k, v in net.state_dict().items()}
    with torch.no_grad():  # an attack differentiates all the same
        attacked = ATTACKS[attack](net, x, y, eps=0.1, norm=norm, loss=loss)
    size = torch.linalg.vector_norm(
        (attacked - x).flatten(1), torch.inf if norm == "linf" else 2, dim=1
    )
    assert size.max() <= 0.1 * (1 + 1e-5)
    assert 0 <= attacked.min() <= attacked.max() <= 1
    assert torch.equal(x, before)
    assert not attacked.requires_grad
    assert not net.training
    assert all((param.grad == 1).all() for param in net.parameters())
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())
    assert accuracy(net, attacked, y) < 1


@pytest.mark.parametrize(("norm", "loss"), CASES)
def test_more_is_not_weaker(norm, loss, generator):
    net, x, y = conv_net(generator)
    attack = partial(pgd, net, x, y, norm=norm, loss=loss)
    by_eps = [accuracy(net, attack(eps=e), y) for e in (0.01, 0.03, 0.1, 0.3, 1.0, 6.0)]
    assert by_eps == sorted(by_eps, reverse=True)
    assert by_eps[0] > by_eps[-1]
    once = pgd(net, x, y, eps=0.02, norm=norm, loss=loss, steps=3)
    seeded = torch.Generator().manual_seed(1)
    often = pgd(net, x, y, eps=0.02, norm=norm, loss=loss, steps=3, restarts=4, generator=seeded)
    broken = net(once).argmax(1) != y
    assert torch.equal(once[broken], often[broken])
    objective = {"cross_entropy": cross_entropy, "dlr": dlr}[loss]
    still = net(often).argmax(1) == y
    assert (objective(net(often), y) >= objective(net(once), y))[still].all()


@pytest.mark.parametrize("norm", DUAL)
def test_one_step_is_fgsm_where_it_raises_the_loss(norm, generator):
    net, x, y = conv_net(generator)
    one = pgd(net, x, y, eps=0.02, norm=norm, steps=1, step_size=0.02)
    fast = fgsm(net, x, y, eps=0.02, norm=norm)
    better = cross_entropy(net(fast), y) > cross_entropy(net(x), y)
    assert better.any()
    assert torch.allclose(one[better], fast[better])
    assert torch.equal(one[~better], x[~better])


def plain_ascent(net, x, y, threat, steps, step_size):
    """The oracle: one example at a time, no shared batch, the rule for the best point spelt out."""
    best, best_loss, z = x, -float("inf"), x
    for _ in range(steps + 1):
        z = z.detach().requires_grad_()
        logits = net(z)
        loss = cross_entropy(logits, y)
        if logits.argmax() != y:
            return z.detach()
        if loss.item() > best_loss:
            best, best_loss = z.detach(), loss.item()
        (grad,) = torch.autograd.grad(loss.sum(), z)
        z = threat.project(z.detach() + step_size * threat.ascent(grad), x)
    return best


@pytest.mark.parametrize("norm", DUAL)
def test_the_batch_is_its_examples_one_by_one(norm, problem):
    net, x, y = problem
    threat = Threat(0.1, norm)
    batched = pgd(net, x, y, eps=0.1, norm=norm, steps=7, step_size=0.04)
    single = [plain_ascent(net, x[i : i + 1], y[i : i + 1], threat, 7, 0.04) for i in range(len(x))]
    torch.testing.assert_close(batched, torch.cat(single))


@pytest.mark.parametrize("inner", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("outer", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_a_model_may_compute_in_another_precision(inner, outer, attack, problem):
    net, x, y = problem
    model, x = lambda z: net.to(inner)(z.to(inner)), x.to(outer)
    attacked = attack(model, x, y, eps=0.5)
    assert attacked.dtype == outer
    assert accuracy(model, attacked, y) < accuracy(model, x, y)


def test_an_example_that_is_wrong_already_is_returned_as_it_is(problem):
    net, x, y = problem
    assert torch.equal(pgd(net, x, (y + 1) % 3, eps=0.1), x)


def test_random_starts_are_the_generators(generator):
    net, x, y = conv_net(generator)
    attack = partial(pgd, net, x, y, eps=0.01, steps=1, step_size=1e-4, restarts=3)
    draws = [attack(generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize(("loss", "masked"), [("cross_entropy", True), ("dlr", False)])
def test_scaling_the_logits_masks_one_loss_only(loss, masked, generator):
    net, x, y = conv_net(generator)
    plain = accuracy(net, pgd(net, x, y, eps=0.03, loss=loss), y)
    scaled = lambda z: 1e4 * net(z)  # noqa: E731
    attacked = pgd(scaled, x, y, eps=0.03, loss=loss)
    gain = accuracy(net, attacked, y) - plain
    assert gain > 0.1 if masked else abs(gain) <= 0.01


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_no_examples(attack):
    net = torch.nn.Linear(4, 3)
    assert attack(net, torch.empty(0, 4), torch.empty(0, dtype=int), eps=0.1).shape == (0, 4)


X, Y = torch.full((2, 4), 0.5), torch.tensor([0, 2])
REFUSED = {
    "eps": ({"eps": 0.0}, ValueError, "eps must be positive"),
    "loss": ({"loss": "hinge"}, ValueError, 'loss must be "cross_entropy" or "dlr"'),
    "outside": ({"x": X * 4}, ValueError, r"inputs lie in \[2, 2\]"),
    "not a number": ({"x": X * torch.nan}, ValueError, "inputs lie in"),
    "integers": ({"x": torch.ones(2, 4, dtype=int)}, TypeError, "scale integers"),
    "float labels": ({"y": torch.ones(2)}, TypeError, "labels are integers"),
    "label": ({"y": torch.tensor([0, 3])}, ValueError, "has 3 classes"),
    "negative label": ({"y": torch.tensor([0, -1])}, ValueError, "has 3 classes"),
    "labels": ({"y": torch.tensor([0])}, ValueError, "one label per example"),
    "no logits": ({"model": lambda x: x.sum(1)}, ValueError, "logits of shape"),
    "two classes": (
        {"model": lambda x: x[:, :2], "y": torch.tensor([0, 1]), "loss": "dlr"},
        ValueError,
        "at least 3 classes",
    ),
}


@pytest.mark.parametrize(("change", "error", "says"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_refused(change, error, says, attack):
    given = {"model": lambda x: x[:, :3], "x": X, "y": Y, "eps": 0.1, **change}
    model, x, y = (given.pop(key) for key in ("model", "x", "y"))
    with pytest.raises(error, match=says):
        attack(model, x, y, **given)


@pytest.mark.parametrize("change", [{"steps": 0}, {"restarts": 0}, {"step_size": 0.0}], ids=str)
def test_refused_by_pgd(change):
    with pytest.raises(ValueError, match="at least 1"):
        pgd(lambda x: x[:, :3], X, Y, eps=0.1, **change)
