"""Training: against a loop written out by hand, and what it keeps on the sphere."""

import copy
import json
import math
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F

from onsphere.errors import OnsphereError
from onsphere.studies.engine.job import Inputs
from onsphere.studies.setup.network import STUDIED, SmallConvNet
from onsphere.studies.setup.training import (
    Training,
    batches,
    enlarge,
    grown,
    measure,
    measure_statistics,
    network_for,
    optimizer_for,
    rate_at,
    restore,
    train,
)

SHORT = Training("digits", "bn", steps=6, width=4, seed=3)
WEIGHTS = ("head.weight", *[f"convs.{i}.weight" for i in range(3)])


def run(settings, digits):
    return train(asdict(settings), Inputs(digits))


def loop(settings, digits):
    """SGD with momentum as its textbook has it: v <- m v + g + decay w, w <- w - rate v."""
    model = SmallConvNet(settings.method, digits, width=settings.width, seed=settings.seed)
    velocity = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(settings.seed + 1)
    order = torch.randperm(len(digits.train_y), generator=generator)
    for step in range(settings.steps):
        index = order[step * settings.batch : (step + 1) * settings.batch]
        rate = settings.lr
        if settings.schedule == "cosine":
            rate *= (1 + math.cos(math.pi * step / settings.steps)) / 2
        loss = F.cross_entropy(model(digits.train_x[index]), digits.train_y[index])
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for name, p in model.named_parameters():
                decay = settings.weight_decay if name in WEIGHTS else 0.0
                velocity[name] = settings.momentum * velocity[name] + p.grad + decay * p
                p -= rate * velocity[name]
    return model


@pytest.mark.parametrize("method", ["none", "bn", "ln", "rms"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"schedule": "cosine", "weight_decay": 0.1}, {"momentum": 0.0, "weight_decay": 0.1}],
    ids=["constant", "cosine and decay", "no momentum"],
)
def test_training_is_the_loop_written_out(digits, method, changes):
    settings = replace(SHORT, method=method, **changes)
    found, oracle = run(settings, digits), loop(settings, digits)
    for name, value in oracle.state_dict().items():
        torch.testing.assert_close(found.tensors[f"model.{name}"], value, rtol=1e-4, atol=1e-5)
    oracle.eval()
    right = (oracle(digits.test_x).argmax(1) == digits.test_y).float().mean()
    assert found.result["test_accuracy"] == pytest.approx(float(right), abs=0.005)


def test_the_same_seed_gives_the_same_record_and_another_does_not(digits):
    one, two, other = (run(replace(SHORT, seed=seed), digits) for seed in (3, 3, 4))
    assert json.dumps(one.result) == json.dumps(two.result)
    assert all(torch.equal(value, two.tensors[name]) for name, value in one.tensors.items())
    assert one.result != other.result


@pytest.mark.parametrize("method", [m for m in STUDIED if m != "none"])
def test_on_the_sphere_lengths_stay_and_directions_move(digits, method):
    settings = replace(SHORT, method=method, space="sphere", lr=0.5)
    start = SmallConvNet(method, digits, width=settings.width, seed=settings.seed)
    outcome = run(settings, digits)
    model = restore(settings, Inputs(digits, (outcome.result,), (outcome.tensors,)))
    before = start.hidden_weights()
    for name, (weight, axes) in model.hidden_weights().items():
        old = before[name][0]
        torch.testing.assert_close(axes.norms(weight), axes.norms(old), rtol=2e-6, atol=0)
        assert F.cosine_similarity(weight.flatten(), old.flatten(), dim=0) < 0.9999


def test_plain_training_of_normalized_weights_grows_them(digits):
    start = SmallConvNet("bn", digits, width=SHORT.width, seed=SHORT.seed).hidden_weights()
    trained = run(replace(SHORT, lr=0.5), digits).tensors
    for name, (weight, _) in start.items():
        assert trained[f"model.{name}"].norm() > 1.01 * weight.norm()


@pytest.mark.parametrize("space", ["plain", "sphere"])
@pytest.mark.parametrize("method", STUDIED)
def test_decay_is_for_weights_and_never_for_gains_or_biases(digits, method, space):
    model = SmallConvNet(method, digits, width=4)
    optimizer = optimizer_for(model, replace(SHORT, method=method, space=space, weight_decay=0.1))
    given = [
        (id(p), group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    ]
    decay = dict(given)
    assert len(given) == len(decay) == len(list(model.parameters()))
    hidden = set(model.hidden_weights()) if space == "plain" else set()
    decayed = {name for name, p in model.named_parameters() if decay[id(p)] > 0}
    assert decayed == {"head.weight"} | hidden
    assert len(model.hidden_weights()) == 3


def test_a_diverged_run_is_recorded_as_such(digits):
    outcome = run(replace(SHORT, method="none", lr=1e4, steps=12), digits)
    json.dumps(outcome.result, allow_nan=False)
    assert outcome.result["diverged"] is True
    assert outcome.result["train_loss"] is None
    assert outcome.result["test_accuracy"] == pytest.approx(0.1)
    assert outcome.result["steps_done"] < 12


def test_a_loss_without_a_number_counts_as_chance(digits):
    model = SmallConvNet("none", digits, width=4)
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))
    found = measure(model, digits)
    assert found["diverged"]
    assert (found["train_loss"], found["train_accuracy"]) == (None, 0.1)


def test_noise_trains_the_hidden_weights_alone(digits):
    settings = replace(SHORT, objective="noise", lr=1.0)
    start = SmallConvNet("bn", digits, width=settings.width, seed=settings.seed)
    trained = run(settings, digits).tensors
    hidden = start.hidden_weights()
    for name, parameter in start.named_parameters():
        assert torch.equal(trained[f"model.{name}"], parameter) == (name not in hidden)


def test_a_diverged_network_is_told_in_one_line(digits):
    with pytest.raises(OnsphereError, match="method 'bn', seed 3, diverged while training"):
        restore(SHORT, Inputs(digits, ({"diverged": True},), ({},)))


def test_the_record_holds_norm_gradient_and_rotation_of_every_step(digits):
    settings = replace(SHORT, record=True)
    tensors = run(settings, digits).tensors
    start = SmallConvNet("bn", digits, width=settings.width, seed=settings.seed)
    for name, (weight, axes) in start.hidden_weights().items():
        series = {q: tensors[f"series.{name}.{q}"] for q in ("norm", "gradient_square", "rotation")}
        assert {len(values) for values in series.values()} == {settings.steps}
        assert all((values > 0).any() for values in series.values())
        torch.testing.assert_close(series["norm"][0].flatten(), axes.norms(weight).flatten())


def test_a_batch_is_no_larger_than_the_data():
    drawn = list(batches(10, replace(SHORT, batch=256, steps=3)))
    assert [sorted(index.tolist()) for index in drawn] == [[*range(10)]] * 3


@pytest.mark.parametrize(("count", "batch", "steps"), [(10, 4, 5), (64, 64, 3), (9, 3, 3)])
def test_every_epoch_shows_each_image_at_most_once(count, batch, steps):
    drawn = list(batches(count, replace(SHORT, batch=batch, steps=steps)))
    assert [len(index) for index in drawn] == [batch] * steps
    per_epoch = count // batch
    for first in range(0, steps, per_epoch):
        epoch = torch.cat(drawn[first : first + per_epoch]).tolist()
        assert len(set(epoch)) == len(epoch)
        assert max(epoch) < count


def test_the_cosine_goes_from_the_rate_to_nothing():
    settings = replace(SHORT, schedule="cosine", steps=100)
    assert rate_at(settings, 0) == pytest.approx(settings.lr)
    assert rate_at(settings, 50) == pytest.approx(settings.lr / 2)
    assert rate_at(settings, 99) < 1e-3 * settings.lr
    assert rate_at(SHORT, 5) == SHORT.lr


def test_norms_grow_as_the_law_says():
    lengths = [grown(3.0, t) for t in (0.0, 0.25, 0.5, 1.0)]
    fourth = [x**4 for x in lengths]
    assert fourth == pytest.approx([1.0, 21.0, 41.0, 81.0])
    assert grown(1.0, 0.3) == 1.0


@pytest.mark.parametrize("method", ["bn", "ln", "gn", "wn", "sn"])
@pytest.mark.parametrize("slowing", [1.0, 3.0])
def test_growth_is_forced_and_leaves_the_path(digits, method, slowing):
    kept = replace(SHORT, method=method, space="sphere", rate_growth=slowing)
    small, large = (
        restore(s, Inputs(digits, (made.result,), (made.tensors,)))
        for s in (kept, replace(kept, norm_growth=3.0))
        if (made := run(s, digits))
    )
    for name, (weight, axes) in small.hidden_weights().items():
        larger = large.hidden_weights()[name][0]
        torch.testing.assert_close(axes.norms(larger), 3 * axes.norms(weight))
        assert (larger - 3 * weight).norm() < 5e-3 * larger.norm()
    small.train(), large.train()  # running statistics lag behind norms that grow
    x = digits.train_x[:64]
    assert (large(x) - small(x)).norm() < 1e-2 * small(x).norm()


def test_a_rate_that_falls_changes_the_path(digits):
    sphere = replace(SHORT, space="sphere")
    slowed = replace(sphere, rate_growth=3.0)
    weights = [run(s, digits).tensors["model.convs.0.weight"] for s in (sphere, slowed)]
    assert (weights[0] - weights[1]).norm() > 1e-2 * weights[0].norm()
    assert rate_at(slowed, 3, "hidden") == pytest.approx(SHORT.lr / grown(3.0, 0.5) ** 2)
    assert rate_at(slowed, 3, "head") == SHORT.lr


def test_the_head_is_held_where_that_is_asked(digits):
    start = SmallConvNet("bn", digits, width=SHORT.width, seed=SHORT.seed)
    free, held = (
        run(replace(SHORT, space="sphere", head=head), digits).tensors["model.head.weight"].norm()
        for head in ("free", "sphere")
    )
    length = float(start.head.weight.detach().norm())
    assert float(held) == pytest.approx(length, rel=1e-5)
    assert float(free) != pytest.approx(length, rel=1e-3)


def test_only_hidden_weights_are_enlarged(digits):
    settings = replace(SHORT, space="sphere")
    model = SmallConvNet("bn", digits, width=4, seed=0)
    optimizer = optimizer_for(model, settings)
    model(digits.train_x[:8]).square().mean().backward()
    optimizer.step()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    enlarge(optimizer, 2.0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (2 if "convs" in name else 1))
    optimizer.zero_grad()
    model(digits.train_x[:8]).square().mean().backward()
    optimizer.step()  # stays on the larger sphere
    weight, axes = model.hidden_weights()["convs.0.weight"]
    torch.testing.assert_close(axes.norms(weight), 2 * axes.norms(before["convs.0.weight"]))


@pytest.mark.parametrize("forced", [{"norm_growth": 2.0}, {"rate_growth": 2.0}, {"head": "sphere"}])
def test_nothing_is_forced_on_plain_weights(forced):
    with pytest.raises(ValueError, match="on the sphere only"):
        replace(SHORT, **forced)


@pytest.mark.parametrize(
    ("decayed", "shrinks"),
    [("all", (True, True)), ("hidden", (True, False)), ("head", (False, True))],
)
def test_weights_decay_where_they_should(digits, decayed, shrinks):
    """A decay so strong that nothing else counts, on both ways of training."""
    from onsphere.studies.setup.ensemble import train_ensemble

    settings = Training(
        "digits", "ln", lr=0.01, momentum=0.0, weight_decay=20.0, decayed=decayed, steps=5, width=4
    )
    start = SmallConvNet("ln", digits, width=4)
    for outcome in (
        train(asdict(settings), Inputs(digits)),
        *train_ensemble([settings] * 2, digits),
    ):
        ratios = [
            float(outcome.tensors[f"model.{name}"].norm() / start.state_dict()[name].norm())
            for name in ("convs.1.weight", "head.weight")
        ]
        assert tuple(ratio < 0.6 for ratio in ratios) == shrinks


@pytest.mark.parametrize("scale", [2.0**-6, 1.0, 2.0**6])
def test_a_fixed_radius_is_there_before_the_first_step(digits, scale):
    settings = Training("digits", "bn", "sphere", radius=1.0, start_scale=scale, width=4)
    for weight, axes in network_for(settings, digits).hidden_weights().values():
        assert torch.allclose(axes.norms(weight), torch.ones(()), atol=1e-6)


def test_statistics_measured_anew_are_those_of_the_data(digits):
    settings = Training("digits", "bn", steps=5, width=4)
    model = network_for(settings, digits)
    for norm in model.norms:
        norm.running_var.mul_(100)
    fresh = measure_statistics(copy.deepcopy(model), digits, settings)
    assert not fresh.training
    assert all(a.momentum == b.momentum for a, b in zip(fresh.norms, model.norms, strict=True))
    whole = fresh.convs[0]((digits.train_x - fresh.input_mean) / fresh.input_spread)
    assert torch.allclose(fresh.norms[0].running_var, whole.var((0, 2, 3)), rtol=0.2)
    plain = SmallConvNet("ln", digits, width=4)
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    measure_statistics(plain, digits, settings)
    assert all(torch.equal(before[name], value) for name, value in plain.state_dict().items())
