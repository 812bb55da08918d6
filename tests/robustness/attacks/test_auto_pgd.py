"""Auto-PGD: closed forms, invariance to the logits' scale, schedule, what it leaves alone."""

from functools import partial

import pytest
import torch

from onsphere.robustness import apgd, apgd_targeted, correct_mask, margin, pgd
from onsphere.robustness.attacks.auto_pgd import checkpoints
from robustness.problems import DUAL, WIDE, conv_net, distances, inside, linear

ATTACKS = {
    "tempered": partial(apgd, loss="tempered_cross_entropy"),
    "cross_entropy": partial(apgd, loss="cross_entropy"),
    "dlr": partial(apgd, loss="dlr"),
    "targeted": apgd_targeted,
}
seeded = lambda: torch.Generator().manual_seed(0)  # noqa: E731


@pytest.mark.parametrize("norm", DUAL)
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_the_targeted_attack_breaks_exactly_what_is_within_reach(norm, classes, generator):
    net, x, y = linear(generator, classes=classes)
    reach = distances(net, x, y, norm)
    eps = reach.median().item()
    attacked = apgd_targeted(
        net, x, y, eps=eps, norm=norm, steps=40, bounds=WIDE, generator=generator
    )
    clear = (reach - eps).abs() > 1e-3 * eps  # the median itself is on the edge
    assert torch.equal(correct_mask(net, attacked, y)[clear], (reach > eps)[clear])


@pytest.mark.parametrize("norm", DUAL)
@pytest.mark.parametrize("attack", ["tempered", "cross_entropy"])
def test_two_classes_have_a_closed_form(norm, attack, generator):
    net, x, y = linear(generator, classes=2)
    reach = distances(net, x, y, norm)
    eps = 0.7 * reach.median().item()
    attacked = ATTACKS[attack](
        net, x, y, eps=eps, norm=norm, steps=40, bounds=WIDE, generator=generator
    )
    assert torch.equal(correct_mask(net, attacked, y), reach > eps)
    standing = reach > eps
    slope = torch.linalg.vector_norm(net.weight[0] - net.weight[1], DUAL[norm])
    worst = margin(net(x), y) - eps * slope
    torch.testing.assert_close(
        margin(net(attacked), y)[standing], worst[standing], rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("norm", DUAL)
@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_ball_box_and_model_are_respected(norm, attack, generator):
    net, x, y = conv_net(generator)
    before = x.clone()
    with torch.no_grad():
        attacked = attack(net, x, y, eps=0.05, norm=norm, steps=10, generator=generator)
    assert inside(attacked, x, 0.05, norm)
    assert torch.equal(x, before)
    assert not attacked.requires_grad
    assert correct_mask(net, attacked, y).sum() < len(y)


@pytest.mark.parametrize("norm", DUAL)
@pytest.mark.parametrize("attack", ["tempered", "dlr", "targeted"])
@pytest.mark.parametrize("power", [-7, 10])
def test_a_power_of_two_before_the_logits_changes_no_bit(norm, attack, power, generator):
    net, x, y = conv_net(generator)
    run = partial(ATTACKS[attack], x=x, y=y, eps=0.03, norm=norm, steps=25)
    scaled = lambda z: 2.0**power * net(z)  # noqa: E731
    assert torch.equal(run(scaled, generator=seeded()), run(net, generator=seeded()))


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_a_near_tie_of_clean_logits_hides_nothing(scale):
    x = torch.tensor([[0.5, 0.5 - 1e-6, 0.5 - 1e-6]]).expand(100, -1)
    y = torch.zeros(100, dtype=torch.long)
    model = lambda z: scale * z  # noqa: E731
    attacked = apgd(model, x, y, eps=0.25, steps=30, generator=seeded())
    assert not correct_mask(model, attacked, y).any()


@pytest.mark.parametrize("attack", [apgd, partial(apgd, loss="cross_entropy"), pgd])
def test_a_gradient_entry_that_is_no_number_does_not_end_an_attack(attack):
    """The square root at 0 has an infinite slope, and 0 times that is no number."""
    model = lambda z: z[:, 1:] + 0 * (z[:, :1] - z[:, :1]).sqrt()  # noqa: E731
    x, y = torch.tensor([[0.5, 0.6, 0.5]]), torch.tensor([0])
    attacked = attack(model, x, y, eps=0.1, norm="l2", steps=10, generator=seeded())
    assert inside(attacked, x, 0.1, "l2")
    assert not correct_mask(model, attacked, y).any()


def test_plain_cross_entropy_is_blind_where_the_tempered_one_sees(generator):
    net, x, y = conv_net(generator)
    large = lambda z: 1e4 * net(z)  # noqa: E731
    run = partial(apgd, large, x, y, eps=0.05, steps=10)
    tempered, plain = (
        correct_mask(net, run(loss=loss, generator=seeded()), y).double().mean()
        for loss in ("tempered_cross_entropy", "cross_entropy")
    )
    assert plain > tempered + 0.1


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_the_generator_alone_decides(attack, generator):
    net, x, y = conv_net(generator)
    run = partial(attack, net, x, y, eps=0.01, steps=5, restarts=2)
    first, again, other = (run(generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_what_is_wrong_already_stays_and_restarts_do_not_harm(attack, generator):
    net, x, y = conv_net(generator)
    assert torch.equal(attack(net, x, (y + 1) % 5, eps=0.1), x)
    once, often = (
        correct_mask(net, attack(net, x, y, eps=0.02, steps=5, restarts=k, generator=seeded()), y)
        for k in (1, 3)
    )
    assert (often <= once).all()


def test_giving_up_costs_nothing_here_and_saves_calls(generator):
    net, x, y = conv_net(generator, examples=50)
    shown = {}

    def counted(factor):
        def model(z):
            shown[factor] = shown.get(factor, 0) + len(z)
            return net(z)

        return model

    left = {
        factor: correct_mask(
            net,
            apgd_targeted(
                counted(factor),
                x,
                y,
                eps=0.02,
                steps=50,
                early_stopping_factor=factor,
                generator=seeded(),
            ),
            y,
        )
        for factor in (None, 4.0)
    }
    assert left[None].any()
    assert int(left[4.0].sum()) <= int(left[None].sum()) + 1
    assert shown[4.0] < 0.7 * shown[None]


def test_broken_examples_leave_the_batch(generator):
    net, x, y = conv_net(generator)
    sizes = []

    def spy(z):
        sizes.append(len(z))
        return net(z)

    apgd(spy, x, y, eps=1.0, steps=50, generator=generator)
    assert len(sizes) < 20
    assert sizes[-1] < 0.5 * sizes[1]


def test_checkpoints_are_the_published_ones():
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(1) == [1]
    assert checkpoints(20)[0] == 5


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_no_examples(attack):
    net = torch.nn.Linear(4, 3)
    assert attack(net, torch.empty(0, 4), torch.empty(0, dtype=int), eps=0.1).shape == (0, 4)


@pytest.mark.parametrize(
    ("attack", "change", "says"),
    [
        (apgd, {"eps": -1.0}, "eps must be positive"),
        (apgd, {"steps": 0}, "steps is at least 1"),
        (apgd, {"restarts": 0}, "restarts is at least 1"),
        (apgd, {"loss": "hinge"}, 'loss must be "tempered_cross_entropy"'),
        (apgd_targeted, {"targets": 0}, "targets is at least 1"),
        (apgd_targeted, {"batch_size": 0}, "batch_size is at least 1"),
    ],
)
def test_refused(attack, change, says):
    with pytest.raises(ValueError, match=says):
        attack(
            torch.nn.Linear(4, 3), torch.rand(2, 4), torch.tensor([0, 1]), **{"eps": 0.1, **change}
        )
