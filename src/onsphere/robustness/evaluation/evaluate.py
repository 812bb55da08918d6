"""Robust accuracy that masking cannot fool."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import get_args

import torch
from torch import Tensor, nn

from onsphere.errors import choice
from onsphere.robustness.attacks.pgd import Model, check_logits
from onsphere.robustness.attacks.threat_model import Norm, Threat
from onsphere.robustness.classifier import logits_of
from onsphere.robustness.evaluation.accuracy import judged
from onsphere.robustness.evaluation.masking_checks import (
    numbers_check,
    refuse_batch_statistics,
    trust_checks,
)
from onsphere.robustness.evaluation.outputs import (
    Average,
    are_probabilities,
    log_of,
    mean_over_draws,
)
from onsphere.robustness.evaluation.result import (
    ROBUST,
    WRONG,
    Check,
    Evaluation,
    EvaluationError,
    Stage,
)
from onsphere.robustness.evaluation.suite import ATTACKS, WITHOUT_GRADIENTS, Budget, chosen

Batches = Sequence[Tensor] | Iterable[Sequence[Tensor]]

_PROBED = 2  # examples that the model is tried on before the attacks
_LOOKED_AT = 32  # examples by which probabilities are recognized
_ROUNDING = 1e-6  # of the width of the box: how far outside the ball rounding may put a point


def evaluate(
    model: Model,
    batches: Batches,
    *,
    eps: float,
    norm: Norm = "linf",
    bounds: tuple[float, float] = (0.0, 1.0),
    attacks: str | Sequence[str] = "standard",
    budget: Budget | None = None,
    checks: bool = True,
    draws: int = 1,
    average: str = "probabilities",
    seed: int = 0,
    progress: bool | Callable[[str, int, int], None] | None = None,
) -> Evaluation:
    """Measure the accuracy of a classifier in the worst case of several attacks.

    The attacks run from cheap to expensive, each on the examples that are still right; an example
    counts as robust when none breaks it. Whether one did is judged by another run of the model on
    what the attack returned, and by its distance. No attack depends on the scale of the logits.
    Inputs in half precision are attacked in float32, which holds a small ball, and rounded where
    the model is called.

    Robust accuracy is an upper bound, and a network may look robust because it hides its
    gradients. So the number comes with checks on a random part of the examples (see
    :func:`~onsphere.robustness.evaluation.masking_checks.trust_checks`); print the result to
    read them.

    A model that is random (noise, dropout, a random resize) is evaluated as its mean: with
    ``draws=n`` every pass is the mean of n, attacks follow its gradient (expectation over
    transformations), and what they find is judged by n new draws. That is the accuracy of the
    vote. AutoAttack's version "rand" averages gradients of the loss instead and judges by a single
    draw, so that chance alone breaks some examples.

    Args:
        model: a classifier in eval mode: a callable from inputs to logits ``(batch, classes)``, or
            to a dictionary, tuple or ``ModelOutput`` (Hugging Face) that holds them. Outputs that
            sum to one are taken for probabilities: their logarithms are attacked, and the result
            says so. Where it is a module, batches are moved to the device of its parameters.
        batches: pairs ``(x, y)`` of inputs inside the bounds and integer labels: a
            ``DataLoader``, a list, or one pair of tensors.
        eps: radius of the ball, in the units of the input.
        norm: ``"linf"`` or ``"l2"``.
        bounds: least and greatest value of an entry.
        attacks: ``"standard"`` (the members of standard AutoAttack: APGD on cross-entropy,
            targeted APGD, targeted FAB, Square), ``"quick"`` (the first two), ``"rand"`` (APGD on
            cross-entropy and on DLR, as AutoAttack has it for random models), or names of attacks.
        budget: what the attacks may spend; ``Budget()`` if not given.
        checks: run the checks. Logits that are no numbers are flagged without them, too.
        draws: of a random model, how many passes are averaged; 20 in AutoAttack. Time and memory
            grow with it.
        average: ``"probabilities"`` or ``"logits"``: what is averaged.
        seed: of everything random. Equal calls on the CPU give equal results.
        progress: ``True`` for a bar with the time left (lines where the error stream is piped), or
            a function of the attack's name, examples done, and examples in all.

    Returns:
        Accuracies with intervals, the fate of every example, and the checks.

    Raises:
        EvaluationError: ``eps`` not positive or as wide as the box, inputs outside the bounds,
            labels out of range, something that is no logits, logits that carry no gradient to an
            attack that needs one, an unknown attack, no examples, fewer than one draw, or a module
            whose outputs depend on the batch. What the model itself raises is not caught.

    Example:
        >>> import torch
        >>> x, y = torch.tensor([[0.6, 0.4, 0.0], [0.9, 0.1, 0.0]]), torch.tensor([0, 0])
        >>> found = evaluate(torch.nn.Identity(), (x, y), eps=0.25, attacks="quick")
        >>> found.clean_accuracy.value, found.robust_accuracy.value, found.fates
        (1.0, 0.5, ('apgd-ce', 'robust'))

    Source: Croce & Hein, 2020 (arXiv 2003.01690); Carlini et al., 2019 (arXiv 1902.06705), on
    what to check.
    """
    from onsphere.report.progress import shown

    names, budget = chosen(attacks), budget or Budget()
    with _refusing():
        threat = Threat(eps, norm, bounds)
        average = choice("average", average, get_args(Average))
    if draws < 1:
        raise EvaluationError(f"draws is at least 1, got {draws}")
    x, y = _gathered(batches, model)
    with _refusing():
        threat.check(x, y)
    if eps >= threat.width(x):
        raise EvaluationError(
            f"eps={eps:g} reaches across the whole box between {bounds[0]:g} and {bounds[1]:g}, "
            "where no classifier withstands; give it in the units of the data, as 8/255"
        )
    y = y.long()
    refuse_batch_statistics(model, x)
    model, x = _in_full_precision(model, x)
    with _seeded(seed, x, draws):
        _check_model(model, x, y, names)
        gives = _outputs(model, x, threat)
        model = _attacked(model, gives, draws, average)
        right, undefined = judged(model, x, y, batch_size=budget.batch_size)
        fates = [ROBUST if correct else WRONG for correct in right.tolist()]
        standing, stages = right.clone(), []
        with shown(progress) as show:
            for name in names:
                start, todo = time.perf_counter(), standing.nonzero().squeeze(1)
                broken, lost = _run(name, model, x, y, todo, threat, budget, seed, show)
                for row in todo[broken].tolist():
                    fates[row] = name
                standing[todo[broken]] = False
                undefined[todo[broken & lost]] = True
                seconds = round(time.perf_counter() - start, 3)
                stages.append(Stage(name, len(todo), int(broken.sum()), seconds))
        found: list[Check] = []
        if checks or undefined.any():
            found.append(numbers_check(int(undefined.sum()), len(x)))
        if checks:
            found += trust_checks(
                model, x, y, right.nonzero().squeeze(1), threat, stages, seed=seed,
                batch_size=budget.batch_size, draws=draws,
            )  # fmt: skip
    settings = {
        "eps": float(eps), "norm": threat.norm, "bounds": (float(bounds[0]), float(bounds[1])),
        "attacks": list(names), "seed": seed, "outputs": gives, "draws": draws,
        "average": average, **asdict(budget),
    }  # fmt: skip
    return Evaluation(tuple(fates), tuple(stages), tuple(found), settings)


@contextmanager
def _refusing() -> Iterator[None]:
    """Turn what our own checks raise into the error of an evaluation."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise EvaluationError(str(error)) from error


def _in_full_precision(model: Model, x: Tensor) -> tuple[Model, Tensor]:
    """Return inputs in at least float32, and a function from these to logits.

    In half precision a point inside a small ball rounds to one outside.
    """
    dtype = x.dtype
    return lambda z: logits_of(model(z.to(dtype))), x.to(torch.promote_types(dtype, torch.float32))


@contextmanager
def _seeded(seed: int, x: Tensor, draws: int) -> Iterator[None]:
    """Let the draws of a random model depend on the seed alone, and leave no trace."""
    if draws == 1:
        yield
        return
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def _outputs(model: Model, x: Tensor, threat: Threat) -> str:
    """Say whether a model gives logits or probabilities."""
    some = x[:_LOOKED_AT]
    generator = torch.Generator(x.device).manual_seed(0)
    sums_to_one = are_probabilities(model(some), model(threat.sample(some, generator)))
    return "probabilities" if sums_to_one else "logits"


def _attacked(model: Model, gives: str, draws: int, average: str) -> Model:
    """Return the logits that attacks see."""
    plain = (lambda x: log_of(model(x))) if gives == "probabilities" else model
    return plain if draws == 1 else mean_over_draws(plain, draws, average)


def _check_model(model: Model, x: Tensor, y: Tensor, names: Sequence[str]) -> None:
    """Refuse, before the first attack, a model that one of the attacks cannot work on."""
    with torch.enable_grad():
        point = x[:_PROBED].detach().clone().requires_grad_()
        logits = model(point)
    with _refusing():
        check_logits(logits, y[:_PROBED])
        check_logits(logits[:1].expand(len(y), -1), y)  # every label has a column
    if "apgd-dlr" in names and logits.shape[1] < 3:
        raise EvaluationError(
            f"apgd-dlr needs at least 3 classes, and the model has {logits.shape[1]}: choose "
            'other attacks, e.g. attacks="standard"'
        )
    if WITHOUT_GRADIENTS.issuperset(names):
        return
    gradient = None
    if logits.requires_grad:
        (gradient,) = torch.autograd.grad(logits.sum(), point, allow_unused=True)
    if gradient is None:
        raise EvaluationError(
            "the model's output carries no gradient to its input, which attacks follow: take "
            'torch.no_grad, detach, argmax and the like out of it, or use attacks="square"'
        )


def _run(
    name: str,
    model: Model,
    x: Tensor,
    y: Tensor,
    todo: Tensor,
    threat: Threat,
    budget: Budget,
    seed: int,
    progress: Callable[[str, int, int], None],
) -> tuple[Tensor, Tensor]:
    """Attack some of the examples.

    Returns:
        Which of them are wrong afterwards, inside the ball; and which have no logits there.
    """
    generator = torch.Generator(x.device).manual_seed(seed)
    broken, undefined = torch.zeros(2, len(todo), dtype=torch.bool, device=x.device)
    slack = _ROUNDING * (threat.bounds[1] - threat.bounds[0])
    together = budget.together(name)
    for first in range(0, len(todo), together):
        rows = todo[first : first + together]
        attacked = ATTACKS[name](model, x[rows], y[rows], threat, budget, generator)
        near = threat.distance(attacked, x[rows]) <= threat.eps + slack
        right, lost = judged(model, attacked, y[rows])
        part = slice(first, first + len(rows))
        broken[part], undefined[part] = near & ~right, lost
        progress(name, first + len(rows), len(todo))
    return broken, undefined


def _gathered(batches: Batches, model: Model) -> tuple[Tensor, Tensor]:
    """Return all inputs and labels, on the model's device."""
    pairs: Iterable[Sequence[Tensor]]
    if isinstance(batches, tuple | list) and len(batches) == 2 and _is_pair(batches):
        pairs = [batches]  # type: ignore[list-item]
    else:
        pairs = batches  # type: ignore[assignment]
    xs: list[Tensor] = []
    ys: list[Tensor] = []
    for pair in pairs:
        if not _is_pair(pair):
            raise EvaluationError(
                f"each batch is a pair (x, y) of tensors, got {_described(pair)}; choose the "
                "inputs and labels of yours, e.g. ((b['image'], b['label']) for b in loader)"
            )
        if len(pair[0]) != len(pair[1]):
            raise EvaluationError(
                f"one label per example: batch {len(xs)} has {len(pair[0])} inputs and "
                f"{len(pair[1])} labels"
            )
        xs.append(pair[0].detach())
        ys.append(pair[1])
    if not sum(len(x) for x in xs):
        raise EvaluationError("there are no examples to evaluate on: batches is empty")
    shapes = sorted({tuple(x.shape[1:]) for x in xs})
    if len(shapes) > 1:
        raise EvaluationError(f"examples of all batches have one shape, got {shapes[:3]}")
    device = xs[0].device
    if isinstance(model, nn.Module):
        device = next((p.device for p in model.parameters()), device)
    return torch.cat(xs).to(device), torch.cat(ys).to(device)


def _is_pair(pair: object) -> bool:
    return (
        isinstance(pair, tuple | list)
        and len(pair) == 2
        and all(isinstance(part, Tensor) for part in pair)
        and all(part.ndim > 0 for part in pair)
    )


def _described(value: object) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {', '.join(type(v).__name__ for v in value[:4])}"
    return f"a {type(value).__name__}"
