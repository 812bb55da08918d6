"""What models return: containers, probabilities, numbers that are none, and random draws."""

from collections import OrderedDict
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from onsphere.robustness import Budget, Evaluation, evaluate, mean_over_draws, pgd
from onsphere.robustness.classifier import Classifier
from onsphere.robustness.evaluation.html import document
from robustness.problems import DUAL, WIDE, conv_net, distances, linear

SHORT = Budget(steps=10, targets=3, queries=40)
RUN = partial(evaluate, eps=0.1, attacks="quick", budget=SHORT, checks=False)


class Output(OrderedDict):
    """As the ModelOutput of transformers: a dictionary with attributes."""

    def __getattr__(self, name):
        return self[name]


CONTAINERS = {
    "dictionary": lambda z: {"loss": z.sum(), "logits": z},
    "dictionary of one": lambda z: {"out": z},
    "model output": lambda z: Output(loss=z.sum(), logits=z, hidden_states=(z, z)),
    "attribute": lambda z: SimpleNamespace(logits=z),
    "tuple of one": lambda z: (z,),
}


@pytest.mark.parametrize("wrap", CONTAINERS.values(), ids=CONTAINERS)
def test_logits_are_picked(wrap, generator):
    net, x, y = conv_net(generator, examples=15)
    assert RUN(lambda z: wrap(net(z)), (x, y)) == RUN(net, (x, y))
    assert torch.equal(Classifier(lambda_module(lambda z: wrap(net(z))))(x), net(x))


def lambda_module(function):
    module = torch.nn.Module()
    module.forward = function
    return module


def test_an_output_of_transformers_is_one_of_these():
    outputs = pytest.importorskip("transformers.modeling_outputs")
    made = outputs.ImageClassifierOutput(logits=torch.ones(2, 3), hidden_states=None)
    assert torch.equal(Classifier(lambda_module(lambda _: made))(torch.ones(1)), torch.ones(2, 3))


@pytest.mark.parametrize("norm", DUAL)
def test_probabilities_are_recognized_and_the_number_is_that_of_the_logits(norm, generator):
    net, x, y = linear(generator, classes=4)
    reach = distances(net, x, y, norm)
    eps = reach.sort().values[40:42].mean().item()
    run = partial(
        evaluate, batches=(x, y), eps=eps, norm=norm, bounds=WIDE, budget=Budget(60, queries=50),
        checks=False,
    )  # fmt: skip
    found = run(lambda z: net(z).softmax(1))
    assert found.settings["outputs"] == "probabilities"
    assert found.robust_accuracy == run(net).robust_accuracy
    assert found.robust_accuracy.count == int((reach > eps).sum())
    assert "Outputs sum to one: taken for probabilities" in str(found)
    assert "Outputs sum to one" in str(document(found, None, model="m", data="d"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_probabilities_in_any_precision(dtype, generator):
    net, x, y = conv_net(generator, examples=15)
    assert RUN(lambda z: net(z).softmax(1).to(dtype), (x, y)).settings["outputs"] == "probabilities"


def test_logits_that_sum_to_one_by_accident_stay_logits():
    x, y = torch.tensor([[0.6, 0.4, 0.0], [0.9, 0.1, 0.0]]), torch.tensor([0, 0])
    found = RUN(torch.nn.Identity(), (x, y))
    assert (found.settings["outputs"], found.notes) == ("logits", ())


def test_saturated_probabilities_are_suspicious(generator):
    """What a softmax has rounded to 0 and 1 has no gradient left."""
    net, x, y = conv_net(generator, examples=15)
    found = evaluate(
        lambda z: (1e4 * net(z)).softmax(1), (x, y), eps=0.1, attacks="quick", budget=SHORT
    )
    assert "gradients are there" in {check.name for check in found.suspicious}


@pytest.mark.parametrize("checks", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_flagged(value, checks, generator):
    net, x, y = conv_net(generator, examples=20)

    def broken(z):
        bright = z.flatten(1).amax(1) > x[:3].flatten(1).amax(1).min()
        return torch.where(bright[:, None], value * torch.ones(5), net(z))

    lost = int(broken(x).isfinite().logical_not().any(1).sum())
    found = evaluate(broken, (x, y), eps=0.02, attacks="quick", budget=SHORT, checks=checks)
    check = found.checks[0]
    assert (check.name, check.finding) == ("logits are numbers", "suspicious")
    assert check.measured >= lost / 20 > 0
    assert "! logits are numbers" in str(found)
    repeats = [c.finding for c in found.checks if c.name == "deterministic"]
    assert repeats in ([], ["passed"])  # what is no number twice does not differ
    assert Evaluation.from_dict(found.to_dict()) == found


def test_where_all_logits_are_numbers_it_says_so(generator):
    net, x, y = conv_net(generator, examples=10)
    masked = lambda z: torch.cat([net(z), torch.full((len(z), 1), -torch.inf)], 1)  # noqa: E731
    for model in (net, masked):  # minus infinity is the logarithm of a probability of zero
        check = evaluate(model, (x, y), eps=0.05, attacks="apgd-ce", budget=SHORT).checks[0]
        assert (check.name, check.finding, check.measured) == ("logits are numbers", "passed", 0)


# --- random models --------------------------------------------------------------------------------


def noisy(net, scale):
    """Noise from the global generator, as dropout has it."""
    return lambda z: net(z + scale * torch.randn_like(z))


def test_the_mean_of_a_linear_model_with_noise_has_the_accuracy_without(generator):
    net, x, y = linear(generator, classes=4)
    reach = distances(net, x, y, "l2")
    eps = reach.sort().values[40:42].mean().item()
    run = partial(
        evaluate, noisy(net, 0.3), (x, y), eps=eps, norm="l2", bounds=WIDE, attacks="rand",
        budget=Budget(30), checks=False, average="logits",
    )  # fmt: skip
    exact = int((reach > eps).sum())
    one, many = run(), run(draws=100)
    assert abs(many.robust_accuracy.count - exact) <= 3
    assert many.clean_accuracy.count >= 78 > one.clean_accuracy.count
    assert one.robust_accuracy.count < exact - 5  # chance alone breaks examples
    assert "mean of logits over 100 draws" in str(many)


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_the_gradient_of_a_mean_is_the_mean_of_gradients(average):
    draws = iter(torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5]], dtype=torch.float64))
    factors = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5]], dtype=torch.float64)
    mean = mean_over_draws(lambda z: z * next(draws), 3, average)
    z = torch.tensor([[0.3, -0.7]], dtype=torch.float64, requires_grad=True)
    found = mean(z)
    logits = z * factors
    expected = logits.softmax(1).mean(0).log() if average == "probabilities" else logits.mean(0)
    torch.testing.assert_close(found[0], expected)
    for a, b in zip(found[0], expected, strict=True):
        (one,) = torch.autograd.grad(a, z, retain_graph=True)
        (other,) = torch.autograd.grad(b, z, retain_graph=True)
        torch.testing.assert_close(one, other)


def test_averages_of_probabilities_are_not_decided_by_one_loud_draw():
    loud = iter(torch.tensor([[100.0, 0.0], [0.0, 3.0], [0.0, 3.0]]))
    assert mean_over_draws(lambda _: next(loud)[None], 3)(torch.ones(1)).argmax() == 1
    loud = iter(torch.tensor([[100.0, 0.0], [0.0, 3.0], [0.0, 3.0]]))
    assert mean_over_draws(lambda _: next(loud)[None], 3, "logits")(torch.ones(1)).argmax() == 0


def test_equal_seeds_give_equal_evaluations_of_random_models(generator):
    net, x, y = conv_net(generator, examples=15)
    run = partial(RUN, noisy(net, 0.2), (x, y), draws=3)
    state = torch.random.get_rng_state()
    assert run(seed=1) == run(seed=1)
    assert torch.equal(state, torch.random.get_rng_state())


def test_an_attack_by_hand_takes_the_mean_too(generator):
    net, x, y = conv_net(generator, examples=15)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        attacked = pgd(mean_over_draws(noisy(net, 0.05), 8), x, y, eps=0.1)
    assert (net(attacked).argmax(1) != y).any()


def test_a_model_without_chance_is_its_own_mean(generator):
    net, x, y = conv_net(generator, examples=15)
    assert RUN(net, (x, y), draws=2, average="logits").fates == RUN(net, (x, y)).fates
