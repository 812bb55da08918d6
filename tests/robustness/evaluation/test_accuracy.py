"""Accuracy, plain and in the worst case of several attacks."""

from functools import partial

import pytest
import torch

from onsphere.robustness import accuracy, correct_mask, fgsm, robust_accuracy, robust_mask

NET = torch.nn.Identity()
X = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.7, 0.1], [0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
Y = torch.tensor([0, 1, 0, 1])


def breaker(row):
    """An attack that swaps the logits of examples whose largest one sits in column ``row``."""

    def attack(model, x, y):
        return torch.where((x.argmax(1) == row).unsqueeze(1), x.roll(1, dims=1), x)

    return attack


@pytest.mark.parametrize("batch", [1, 3, 1000])
def test_accuracy(batch):
    assert correct_mask(NET, X, Y, batch_size=batch).tolist() == [True, True, True, False]
    assert accuracy(NET, X, Y, batch_size=batch) == 0.75


@pytest.mark.parametrize("batch", [1, 3, 1000])
def test_the_worst_case_is_taken_per_example(batch):
    share = partial(robust_accuracy, NET, X, Y, batch_size=batch)
    assert share([]) == 0.75
    assert share([breaker(0)]) == 0.25
    assert share([breaker(1)]) == 0.5
    assert share([breaker(0), breaker(1)]) == share([breaker(1), breaker(0)]) == 0.0


def test_broken_examples_are_not_shown_again():
    seen = []

    def spy(model, x, y):
        seen.append(len(x))
        return x

    stands = robust_mask(NET, X, Y, [spy, breaker(0), spy, breaker(1), spy])
    assert seen == [3, 1]
    assert not stands.any()


def test_logits_that_are_not_numbers_are_never_right():
    assert not correct_mask(NET, torch.full((1, 3), torch.nan), torch.tensor([0])).any()


def test_attacks_differentiate_inside(generator):
    assert robust_accuracy(NET, X, Y, [partial(fgsm, eps=0.3)]) == 0.25


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: accuracy(NET, X[:0], Y[:0]), "no examples"),
        (lambda: accuracy(NET, X, Y[:1]), "one label per example"),
        (lambda: accuracy(NET, X, Y, batch_size=0), "batch_size is at least 1"),
        (lambda: accuracy(NET, X, Y + 2), "has 3 classes"),
        (lambda: robust_accuracy(NET, X, Y, [lambda m, x, y: x[:1]]), "another|like those"),
    ],
)
def test_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()
