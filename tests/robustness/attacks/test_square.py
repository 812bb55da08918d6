"""Square: needs no gradients, stays inside, never loses ground, follows the published schedule."""

from functools import partial

import pytest
import torch

from onsphere.robustness import apgd, correct_mask, margin, square_attack
from onsphere.robustness.attacks.square import _pyramid, _two_halves, share_of_image
from robustness.problems import DUAL, Quantized, conv_net, distances, inside, linear

seeded = lambda seed=0: torch.Generator().manual_seed(seed)  # noqa: E731


@pytest.mark.parametrize("norm", DUAL)
def test_ball_box_and_progress(norm, generator):
    net, x, y = conv_net(generator)
    eps = {"linf": 0.03, "l2": 0.15}[norm]
    before = x.clone()
    few, many = (
        square_attack(net, x, y, eps=eps, norm=norm, queries=q, generator=seeded())
        for q in (5, 300)
    )
    assert inside(few, x, eps, norm)
    assert inside(many, x, eps, norm)
    assert torch.equal(x, before)
    still = correct_mask(net, many, y)
    assert still.any()
    assert not still.all()
    assert (margin(net(many), y) <= margin(net(few), y))[still].all()


def test_a_linear_classifier_of_two_classes_is_broken_where_it_can_be(generator):
    net, x, y = linear(generator, classes=2, inputs=6)
    reach = distances(net, x, y, "linf")
    attacked = square_attack(
        net, x, y, eps=0.2, bounds=(-9.0, 9.0), queries=400, generator=generator
    )
    assert torch.equal(
        correct_mask(net, attacked, y), reach > 0.2
    )  # corners of the cube are searched


def test_hidden_gradients_do_not_help(generator):
    net, x, y = conv_net(generator)
    masked = lambda z: net(Quantized.apply(z))  # noqa: E731
    y = masked(x).argmax(1)
    by_gradient = correct_mask(masked, apgd(masked, x, y, eps=0.1, steps=20, generator=seeded()), y)
    by_search = correct_mask(
        masked, square_attack(masked, x, y, eps=0.1, queries=200, generator=seeded()), y
    )
    assert by_search.sum() < 0.5 * by_gradient.sum()


@pytest.mark.parametrize("norm", DUAL)
def test_a_power_of_two_before_the_logits_changes_no_bit(norm, generator):
    net, x, y = conv_net(generator)
    run = partial(square_attack, x=x, y=y, eps=0.05, norm=norm, queries=100)
    scaled = lambda z: 1024 * net(z)  # noqa: E731
    assert torch.equal(run(scaled, generator=seeded()), run(net, generator=seeded()))


def test_the_generator_alone_decides(generator):
    net, x, y = conv_net(generator)
    run = partial(square_attack, net, x, y, eps=0.01, queries=20)
    assert torch.equal(run(generator=seeded(1)), run(generator=seeded(1)))
    assert not torch.equal(run(generator=seeded(1)), run(generator=seeded(2)))


def test_who_gives_up_asks_less_and_loses_little(generator):
    net, x, y = conv_net(generator, examples=16)
    shown = {None: 0, 3.0: 0}

    def counted(factor):
        def model(z):
            shown[factor] += len(z)
            return net(z)

        return model

    left = {
        factor: int(
            correct_mask(
                net,
                square_attack(
                    counted(factor), x, y, eps=0.03, queries=2200, early_stopping_factor=factor,
                    generator=seeded(),
                ),
                y,
            ).sum()
        )
        for factor in shown
    }  # fmt: skip
    assert left[None] > 4
    assert left[3.0] <= left[None] + 1
    assert shown[3.0] < 0.6 * shown[None]


@pytest.mark.parametrize("at", [1500, 4900])
def test_who_gets_there_in_time_is_not_given_up(at):
    asked = 0

    def model(z):  # the margin falls by the same for every doubling, and is 0 at query number `at`
        nonlocal asked
        asked += 1
        left = 1 - torch.log(torch.tensor(float(asked))) / torch.log(torch.tensor(float(at)))
        return torch.stack([left.expand(len(z)), torch.zeros(len(z))], 1)

    y = torch.zeros(3, dtype=torch.long)
    square_attack(
        model, torch.rand(3, 1, 4, 4), y, eps=0.1, early_stopping_factor=1.5, generator=seeded()
    )
    assert at <= asked <= at + 2


def test_who_makes_no_progress_is_given_up():
    asked = 0

    def model(z):
        nonlocal asked
        asked += 1
        return torch.tensor([[1.0, 0.0]]).expand(len(z), 2)

    y = torch.zeros(3, dtype=torch.long)
    square_attack(
        model, torch.rand(3, 1, 4, 4), y, eps=0.1, early_stopping_factor=3.0, generator=seeded()
    )
    assert asked <= 1001


def test_the_schedule_is_the_published_one():
    halved = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
    for k, after in enumerate(halved):
        assert share_of_image(after) == 0.8 / 2**k
        assert share_of_image(after + 1) == 0.8 / 2 ** (k + 1)


def test_bumps_have_length_one_and_two_signs():
    pyramid = _pyramid(5, 5)
    assert pyramid[2, 2] == pyramid.max()
    assert pyramid[2, 2].item() == pytest.approx(1 + 1 / 4 + 1 / 9)
    assert pyramid[0, 0].item() == pytest.approx(1 / 9)
    for height, width in [(1, 1), (2, 1), (3, 3), (5, 9), (8, 8)]:
        bump = _two_halves(height, width)
        assert bump.shape == (height, width)
        assert bump.norm().item() == pytest.approx(1)
        assert height == 1 or bump.min() < 0 < bump.max()


@pytest.mark.parametrize("norm", DUAL)
@pytest.mark.parametrize("shape", [(7,), (3, 1, 1), (1, 2, 9), (2, 3, 4, 2)])
def test_any_shape(norm, shape, generator):
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(4))
    x = torch.rand(9, *shape, generator=generator)
    y = net(x).argmax(1)
    attacked = square_attack(net, x, y, eps=0.3, norm=norm, queries=30, generator=generator)
    assert attacked.shape == x.shape
    assert inside(attacked, x, 0.3, norm)
    assert square_attack(net, x[:0], y[:0], eps=0.3, norm=norm).shape == (0, *shape)


def test_refused():
    with pytest.raises(ValueError, match="queries is at least 1"):
        square_attack(
            torch.nn.Linear(4, 3), torch.rand(2, 4), torch.tensor([0, 1]), eps=0.1, queries=0
        )
