"""Evaluation: worst case per example, invariance to the logits' scale, records, refusals."""

import json
from functools import partial

import pytest
import torch

from onsphere.errors import OnsphereError
from onsphere.robustness import (
    Budget,
    Check,
    Evaluation,
    EvaluationError,
    Proportion,
    Stage,
    evaluate,
)
from robustness.problems import DUAL, WIDE, distances, linear, on_digits

SHORT = Budget(steps=10, targets=3, queries=40)


@pytest.fixture(scope="module")
def digits():
    """A small network trained on the digits of scikit-learn, and images that it was not shown."""
    return on_digits(
        lambda: torch.nn.Sequential(
            torch.nn.Conv2d(1, 8, 3, stride=2), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
            torch.nn.Flatten(), torch.nn.Linear(72, 10),
        ),
        lr=1e-2, epochs=8, count=60,
    )  # fmt: skip


@pytest.mark.parametrize("norm", DUAL)
def test_a_linear_classifier_has_its_exact_robust_accuracy(norm, generator):
    net, x, y = linear(generator, classes=4)
    reach = distances(net, x, y, norm)
    eps = reach.sort().values[40:42].mean().item()
    y[:5] = (y[:5] + 1) % 4  # wrong from the start
    found = evaluate(
        net,
        (x, y),
        eps=eps,
        norm=norm,
        bounds=WIDE,
        budget=Budget(steps=60, queries=50),
        checks=False,
    )
    expected = ["wrong"] * 5 + ["robust" if far else "broken" for far in (reach[5:] > eps).tolist()]
    known = {"wrong", "robust"}
    assert [fate if fate in known else "broken" for fate in found.fates] == expected
    assert found.clean_accuracy.count == 75
    assert [stage.attack for stage in found.stages] == ["apgd-ce", "apgd-t", "fab-t", "square"]


@pytest.mark.parametrize("norm", DUAL)
def test_robust_accuracy_does_not_depend_on_the_scale_of_the_logits(norm, digits):
    net, x, y = digits
    run = partial(
        evaluate, batches=(x, y), eps={"linf": 0.08, "l2": 0.35}[norm], norm=norm, budget=SHORT,
        checks=False,
    )  # fmt: skip
    plain = run(net)
    assert 0.1 < plain.robust_accuracy.value < plain.clean_accuracy.value - 0.1
    for power in (-7, 10):  # about 1e-2 and 1e3, without rounding
        assert run(lambda z, p=power: 2.0**p * net(z)).fates == plain.fates
    for scale in (1e-2, 1e3):
        scaled = run(lambda z, s=scale: s * net(z))
        assert abs(scaled.robust_accuracy.count - plain.robust_accuracy.count) <= 1


def test_attacks_run_from_cheap_to_expensive_on_what_is_left(digits):
    net, x, y = digits
    seen = []
    found = evaluate(
        net, (x, y), eps=0.08, attacks=["square", "apgd-t", "apgd-ce"], budget=SHORT, checks=False,
        progress=lambda *done: seen.append(done),
    )  # fmt: skip
    assert [stage.attack for stage in found.stages] == ["apgd-ce", "apgd-t", "square"]
    left = found.clean_accuracy.count
    for stage in found.stages:
        assert stage.attacked == left
        left -= stage.broken
    assert left == found.robust_accuracy.count == found.accuracies["square"].count
    assert all(found.fates.count(s.attack) == s.broken for s in found.stages)
    assert [name for name, done, total in seen if done == total] == ["apgd-ce", "apgd-t", "square"]


def test_batches_may_come_in_any_usual_form(digits):
    net, x, y = digits
    data = torch.utils.data.TensorDataset(x[:30], y[:30])
    forms = [
        (x[:30], y[:30]),
        [x[:30], y[:30]],
        [(x[:10], y[:10]), (x[10:30], y[10:30])],
        torch.utils.data.DataLoader(data, batch_size=7),
        iter([(x[:30], y[:30])]),
    ]
    run = partial(evaluate, net, eps=0.05, attacks="apgd-ce", budget=Budget(steps=5), checks=False)
    first, *others = (run(form) for form in forms)
    assert all(found == first for found in others)


@pytest.mark.parametrize("inner", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("outer", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", DUAL)
def test_a_model_may_compute_in_another_precision(inner, outer, norm, generator):
    net, x, y = linear(generator, examples=20)
    net = net.to(inner)
    x = x.to(outer)
    y = net(x.to(inner)).argmax(1).to(torch.int32)
    found = evaluate(
        lambda z: net(z.to(inner)),
        (x, y),
        eps=0.5,
        norm=norm,
        budget=Budget(5, 2, 20),
        checks=False,
    )
    assert found.robust_accuracy.value < found.clean_accuracy.value == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_hides_no_success(dtype):
    """Points that half precision rounds out of the ball are no less wrong than in float32."""
    x, y = torch.tensor([[0.6, 0.41, 0.0], [0.9, 0.1, 0.0]]), torch.tensor([0, 0])
    seen = []

    def model(z):
        seen.append(z.dtype)
        return z

    found = evaluate(model, (x.to(dtype), y), eps=0.1007, attacks="quick", checks=False)
    assert found.fates == ("apgd-ce", "robust")
    assert set(seen) == {dtype}


def test_what_the_model_raises_is_not_caught():
    def model(x):
        raise TypeError("a bug of the user's")

    with pytest.raises(TypeError, match="a bug") as caught:
        evaluate(model, (X, Y), eps=0.1)
    assert not isinstance(caught.value, OnsphereError)


def test_without_gradients_search_still_works():
    found = evaluate(
        NET.eval().requires_grad_(False),
        (X, Y),
        eps=0.1,
        attacks="square",
        budget=SHORT,
        checks=False,
    )
    with torch.no_grad():
        frozen = evaluate(
            lambda x: NET(x).detach(), (X, Y), eps=0.1, attacks="square", budget=SHORT, checks=False
        )
    assert frozen == found


def test_equal_seeds_give_equal_evaluations(digits):
    net, x, y = digits
    run = partial(evaluate, net, (x[:15], y[:15]), eps=0.08, budget=Budget(5, 2, 20))
    assert run(seed=1) == run(seed=1)
    state = torch.random.get_rng_state()
    run(seed=2)
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_model_is_left_as_it_was(digits):
    net, x, y = digits
    before = {name: value.clone() for name, value in net.state_dict().items()}
    evaluate(net, (x[:20], y[:20]), eps=0.08, budget=Budget(5, 2, 20))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert not net.training
    assert all(param.grad is None for param in net.parameters())


def test_the_interval_is_wilsons():
    assert Proportion(0, 10).interval == pytest.approx((0.0, 0.27753), abs=1e-5)
    assert Proportion(81, 263).interval == pytest.approx((0.25528, 0.36617), abs=1e-4)
    low, high = Proportion(10, 10).interval
    assert high == pytest.approx(1)
    assert low == pytest.approx(1 - 0.27753, abs=1e-5)


FOUND = Evaluation(
    ("wrong", "apgd-ce", "robust", "robust"),
    (Stage("apgd-ce", 3, 1, 0.5), Stage("square", 2, 0, 1.5)),
    (Check("reaches zero", "suspicious", 0.25, "it does not"),),
    {"eps": 0.1, "norm": "linf", "bounds": (0.0, 1.0), "seed": 0},
)


def test_an_evaluation_survives_a_file(tmp_path):
    path = tmp_path / "new" / "found.json"
    FOUND.to_json(path)
    assert Evaluation.from_json(path) == FOUND
    data = json.loads(path.read_text())
    assert data["robust_accuracy"]["value"] == 0.5
    assert data["robust_accuracy"]["low"] < 0.5 < data["robust_accuracy"]["high"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 99}, "format 99 cannot be read"),
        ({"stages": [{"attack": "x"}]}, "this is no evaluation: TypeError"),
        (
            {"checks": [{"name": "", "finding": "?", "measured": 0, "meaning": ""}]},
            "this is no evaluation",
        ),
        ({"settings": None}, "this is no evaluation"),
    ],
)
def test_another_file_is_refused(change, says, tmp_path):
    path = tmp_path / "found.json"
    path.write_text(json.dumps({**FOUND.to_dict(), **change}))
    with pytest.raises(EvaluationError, match=says):
        Evaluation.from_json(path)
    path.write_bytes(b"\xff{")
    with pytest.raises(EvaluationError, match="does not hold an evaluation"):
        Evaluation.from_json(path)


def test_it_prints_accuracies_checks_and_warnings():
    text = str(FOUND)
    assert "Robust accuracy of 4 examples, linf, eps = 0.1" in text
    assert "! reaches zero: it does not" in text
    assert max(map(len, text.splitlines())) <= 100
    rows = [line.split()[:2] for line in text.splitlines()]
    assert ["apgd-ce", "2"] in rows
    assert ["square", "2"] in rows


X, Y = torch.full((4, 1, 2, 2), 0.5), torch.tensor([0, 1, 2, 0])
NET = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
BATCH_NORM = torch.nn.Sequential(torch.nn.BatchNorm2d(1), *NET)
REFUSED = {
    "eps": ({"eps": 0.0}, "eps must be positive"),
    "outside": ({"batches": (X * 255, Y)}, r"inputs lie in \[127.5, 127.5\].*give the bounds"),
    "bytes": ({"batches": (X.byte(), Y)}, "inputs are floating point"),
    "labels": ({"batches": (X, Y + 1)}, "labels lie in"),
    "few labels": ({"batches": (X, Y[:2])}, "one label per example"),
    "unlike pairs": (
        {"batches": [(X, Y[:3]), (X[:3], Y)]},
        "one label per example: batch 0 has 4 inputs and 3 labels",
    ),
    "infinite bounds": ({"bounds": (0.0, float("inf"))}, "bounds must be finite"),
    "no gradient": ({"model": lambda x: NET(x.detach())}, "carries no gradient"),
    "no graph": ({"model": lambda x: NET(x).detach()}, "carries no gradient"),
    "two classes": (
        {"model": lambda x: NET(x)[:, :2], "batches": (X, Y % 2), "attacks": "apgd-dlr"},
        "apgd-dlr needs at least 3 classes",
    ),
    "no logits": ({"model": lambda x: x.sum((1, 2, 3))}, "logits of shape"),
    "a dictionary": (
        {"model": lambda x: {"a": NET(x), "b": NET(x)}},
        "got a dict with 'a', 'b': wrap yours",
    ),
    "several tensors": ({"model": lambda x: (NET(x), NET(x))}, "got a tuple: wrap yours"),
    "draws": ({"draws": 0}, "draws is at least 1, got 0"),
    "average": ({"draws": 2, "average": "votes"}, "average must be"),
    "one score": ({"model": lambda x: x.flatten(1)[:, :1], "batches": (X, 0 * Y)}, "two classes"),
    "attack": ({"attacks": "standart"}, "did you mean 'standard'"),
    "no attack": ({"attacks": []}, "at least one attack"),
    "empty": ({"batches": []}, "no examples"),
    "no pair": ({"batches": [X]}, r"pair \(x, y\) of tensors, got a Tensor"),
    "three": ({"batches": [(X, Y, Y)]}, "got a tuple of Tensor, Tensor, Tensor"),
    "shapes": ({"batches": [(X, Y), (X[:, :, :1], Y)]}, "one shape"),
    "training": ({"model": BATCH_NORM.train()}, "training mode and '0'.*call model.eval"),
}


@pytest.mark.parametrize(("change", "says"), REFUSED.values(), ids=REFUSED)
def test_refused(change, says):
    given = {"model": NET, "batches": (X, Y), "eps": 0.1, **change}
    with pytest.raises(EvaluationError, match=says) as caught:
        evaluate(given.pop("model"), given.pop("batches"), **given)
    assert isinstance(caught.value, OnsphereError)


def test_a_budget_below_one_is_refused():
    with pytest.raises(EvaluationError, match="queries is at least 1, got 0"):
        Budget(queries=0)
