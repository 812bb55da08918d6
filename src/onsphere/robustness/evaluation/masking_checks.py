"""Checks that tell robustness from masked gradients, each one number with its meaning.

They run on a random part of the examples that the model gets right, with few steps: they ask
whether attacks behave as attacks must, not how robust the model is.

Source: the list of Carlini et al., 2019 (arXiv 1902.06705), sections 4 and 5; Athalye et al., 2018
(arXiv 1802.00420), section 3.1.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from onsphere._torch.copies import copy_of
from onsphere.norms import ActivationNorm
from onsphere.robustness.attacks.auto_pgd import apgd
from onsphere.robustness.attacks.losses import cross_entropy
from onsphere.robustness.attacks.pgd import Model, fgsm
from onsphere.robustness.attacks.square import square_attack
from onsphere.robustness.attacks.threat_model import Threat
from onsphere.robustness.classifier import logits_of
from onsphere.robustness.evaluation.accuracy import correct_mask
from onsphere.robustness.evaluation.result import Check, EvaluationError, Finding, Stage

_EXAMPLES = 50
_STEPS, _QUERIES = 20, 300
_ALONE = 4  # examples that are also given to the model one by one
_CHANCE = 0.02  # differences of accuracy up to this share of the examples are chance
_REPEAT, _BATCH = 1e-5, 1e-3  # relative differences of logits that rounding may make
_NOISE = 4.0  # so many times what two passes differ by may be noise of draws, too
_DECISIONS = 0.05  # so many decisions of a mean over draws may differ from pass to pass
_HIDDEN = 0.05  # more lost gradients than this are suspicious
_SCALES = (1e-2, 1e3)


def trust_checks(
    model: Model,
    x: Tensor,
    y: Tensor,
    right: Tensor,
    threat: Threat,
    stages: Sequence[Stage],
    *,
    seed: int = 0,
    batch_size: int = 128,
    draws: int = 1,
) -> tuple[Check, ...]:
    """Run all checks.

    Args:
        model: a classifier.
        x: inputs.
        y: labels.
        right: indices of the examples that the model gets right.
        threat: the radius, norm and bounds of the evaluation.
        stages: what its attacks found.
        seed: of the choice of examples and of the attacks.
        batch_size: how many examples go through the model at once.
        draws: over how many draws of its randomness the model is a mean; with more than one,
            differences that two passes make are allowed for.

    Returns:
        One check per line of :data:`CHECKS`; all "not run" where the model is right nowhere. One
        that raises is suspicious, and its meaning says what was raised.

    Example:
        >>> import torch
        >>> x, y = 0.2 + 0.6 * torch.eye(3), torch.arange(3)
        >>> checks = trust_checks(torch.nn.Identity(), x, y, y, Threat(0.1), ())
        >>> {check.finding for check in checks}
        {'passed'}
    """
    generator = torch.Generator(x.device).manual_seed(seed)
    order = torch.randperm(len(right), generator=generator, device=x.device)
    rows = right[order[:_EXAMPLES]].sort().values
    if not len(rows):
        return tuple(Check(name, "not run", None, text) for name, (_, text) in CHECKS.items())
    sample = _Sample(model, x[rows], y[rows], threat, tuple(stages), seed, batch_size, draws)
    return tuple(_checked(name, sample) for name in CHECKS)


def refuse_batch_statistics(model: Model, x: Tensor) -> None:
    """Refuse a module in which examples depend on their batch, in the mode it is in.

    The module is not run in training mode: what runs is a copy, so no statistics are updated.

    Raises:
        EvaluationError: it normalizes by the statistics of the batch: in training mode, or in any
            for want of running ones.
    """
    if not isinstance(model, nn.Module):
        return
    norms = {n: m for n, m in model.named_modules() if _over_batches(m)}
    lasting = [n for n, m in norms.items() if getattr(m, "running_mean", None) is None]
    if lasting:
        raise EvaluationError(
            f"{lasting[0]!r} keeps no running statistics and uses those of each batch in every "
            "mode, so an example's logits depend on the others and no attack on it is defined: "
            "train with track_running_stats=True"
        )
    names = [n for n, m in norms.items() if m.training]
    if not names and model.training and len(x) > 1:
        copied = copy_of(model)
        probe = lambda z: logits_of(copied(z))  # noqa: E731
        with torch.random.fork_rng(devices=[]):
            if _repeated(probe, x[:_ALONE]) <= _REPEAT and _one_by_one(probe, x[:_ALONE]) > _BATCH:
                names = [type(model).__name__]
    if names:
        raise EvaluationError(
            f"the model is in training mode and {names[0]!r} uses the statistics of each batch, so "
            "an example's logits depend on the others and no attack on it is defined: call "
            "model.eval() first"
        )


def _over_batches(module: nn.Module) -> bool:
    """Whether a module normalizes by statistics over a batch, where it keeps no running ones."""
    if isinstance(module, ActivationNorm):
        return module.method.statistics == "batch"
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


@dataclass(frozen=True)
class _Sample:
    """The examples of the checks, and the attacks that several of them share."""

    model: Model
    x: Tensor
    y: Tensor
    threat: Threat
    stages: tuple[Stage, ...]
    seed: int
    batch_size: int
    draws: int = 1

    def accuracy(self, attacked: Tensor) -> float:
        """Return the share that is right after an attack."""
        return float(
            correct_mask(self.model, attacked, self.y, batch_size=self.batch_size).double().mean()
        )

    def parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Return inputs and labels, as many at once as may go through the model."""
        return zip(
            torch.split(self.x, self.batch_size), torch.split(self.y, self.batch_size), strict=True
        )

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Return the logits of all examples."""
        return torch.cat([self.model(x) for x, _ in self.parts()])

    def climb(self, *, eps: float | None = None, loss: str = "tempered_cross_entropy") -> Tensor:
        """Run a short Auto-PGD."""
        threat, generator = self.threat, self.seeded()
        run = partial(
            apgd, self.model, eps=threat.eps if eps is None else eps, norm=threat.norm,
            bounds=threat.bounds, loss=loss, steps=_STEPS, generator=generator,
        )  # fmt: skip
        return torch.cat([run(x, y) for x, y in self.parts()])

    def take(self, rows: Tensor) -> "_Sample":
        """Return some of the examples."""
        return replace(self, x=self.x[rows], y=self.y[rows])

    def scaled(self, factor: float) -> "_Sample":
        """Return the same with the logits multiplied."""
        return replace(self, model=lambda x: factor * self.model(x))

    def seeded(self) -> torch.Generator:
        """Return a fresh generator."""
        return torch.Generator(self.x.device).manual_seed(self.seed)

    def flips(self, x: Tensor) -> float:
        """Return the share of points that two passes of a random model decide differently."""
        passes = (correct_mask(self.model, x, self.y, batch_size=self.batch_size) for _ in "ab")
        once, again = passes
        return float((once != again).double().mean())

    @cached_property
    def chance(self) -> float:
        r"""Difference of accuracies under attack that draws of a random model may make by chance.

        Three standard deviations, :math:`3\sqrt{f/n}`, where two passes decide a share f of the n
        points differently; at least one of them counts, for attacks end at the border.
        """
        if self.draws == 1:
            return 0.0
        count = len(self.x)
        return 3 * (max(self.flips(self.climb()), 1 / count) / count) ** 0.5

    @cached_property
    def robust(self) -> float:
        """Accuracy under the short Auto-PGD."""
        return self.accuracy(self.climb())


def _monotone(sample: _Sample) -> float:
    eps = sample.threat.eps
    half, double = (sample.accuracy(sample.climb(eps=k * eps)) for k in (0.5, 2.0))
    return max(sample.robust - half, double - sample.robust)


def _reaches_zero(sample: _Sample) -> float:
    low, high = sample.threat.bounds
    width = high - low
    whole = width if sample.threat.norm == "linf" else width * sample.x[0].numel() ** 0.5
    return sample.accuracy(sample.climb(eps=whole))


def _many_steps(sample: _Sample) -> float:
    threat = sample.threat
    run = partial(fgsm, sample.model, eps=threat.eps, norm=threat.norm, bounds=threat.bounds)
    attacked = torch.cat([run(x, y) for x, y in sample.parts()])
    return sample.robust - sample.accuracy(attacked)


def _gradient_free(sample: _Sample) -> float:
    """Share of what gradients left standing that Square breaks."""
    by_gradient = [s for s in sample.stages if s.attack != "square"]
    by_search = [s for s in sample.stages if s.attack == "square"]
    if by_gradient and by_search:
        return by_search[0].broken / max(1, by_gradient[0].attacked)
    attacked = sample.climb()
    left = correct_mask(sample.model, attacked, sample.y, batch_size=sample.batch_size)
    if not left.any():
        return 0.0
    standing, threat, generator = sample.take(left), sample.threat, sample.seeded()
    run = partial(
        square_attack, sample.model, eps=threat.eps, norm=threat.norm, bounds=threat.bounds,
        queries=_QUERIES, generator=generator,
    )  # fmt: skip
    found = torch.cat([run(x, y) for x, y in standing.parts()])
    broken = ~correct_mask(sample.model, found, standing.y, batch_size=sample.batch_size)
    return float(broken.sum()) / len(sample.x)


def _lost_gradients(sample: _Sample) -> float:
    lost = []
    for x, y in sample.parts():
        with torch.enable_grad():
            point = x.detach().clone().requires_grad_()
            logits = sample.model(point)
            # To a spread of one: whether there is a gradient must not hang on the logits' scale.
            spread = (logits.amax(1) - logits.amin(1)).detach()
            spread = torch.where(spread.isfinite() & (spread > 0), spread, 1.0)
            loss = cross_entropy(logits / spread[:, None], y).sum()
        gradient = torch.autograd.grad(loss, point)[0].flatten(1)
        lost.append((gradient == 0).all(1) | ~gradient.isfinite().all(1))
    return float(torch.cat(lost).double().mean())


def _scale(sample: _Sample) -> float:
    return max(abs(s.accuracy(s.climb()) - sample.robust) for s in map(sample.scaled, _SCALES))


def _blind(sample: _Sample) -> float:
    return sample.accuracy(sample.climb(loss="cross_entropy")) - sample.robust


def _blind_at_unit_scale(sample: _Sample) -> float:
    """Return the same for logits divided by their usual deviation."""
    deviation = float(sample.logits().std(1).median())
    return _blind(sample.scaled(1 / deviation) if deviation > 0 else sample)


def _repeats(sample: _Sample) -> float:
    if sample.draws > 1:
        return sample.flips(sample.x)
    return _difference(sample.logits(), sample.logits())


def _alone(sample: _Sample) -> float:
    x = sample.x[: max(2, min(_ALONE, sample.batch_size))]
    found = _one_by_one(sample.model, x)
    if sample.draws > 1 and found <= _NOISE * max(_repeated(sample.model, x) for _ in range(3)):
        return 0.0
    return found


@torch.no_grad()
def _repeated(model: Model, x: Tensor) -> float:
    """Return the largest difference of two passes, relative to the logits' spread."""
    return _difference(model(x), model(x))


@torch.no_grad()
def _one_by_one(model: Model, x: Tensor) -> float:
    """Return the largest difference between logits in a batch and alone."""
    together = model(x)
    return _difference(together, torch.cat([model(x[i : i + 1]) for i in range(len(x))]))


def _difference(a: Tensor, b: Tensor) -> float:
    """Return the largest difference, relative to the spread of what is finite."""
    finite = a.where(a.isfinite(), torch.nan)
    spread = (finite - finite.nanmean(1, keepdim=True)).abs().nan_to_num(0.0)
    same = (a == b) | (a.isnan() & b.isnan())  # what is no number is equal where both are alike
    difference = float((a - b).abs().nan_to_num(torch.inf).where(~same, 0.0).max())
    size = float(spread.max())
    return difference / size if size > 0 else difference


_Measure = Callable[[_Sample], float]

CHECKS: dict[str, tuple[tuple[_Measure, float], str]] = {
    "deterministic": (
        (_repeats, _REPEAT),
        "difference of two passes, relative to the logits; attacks on a random model need its "
        "mean: evaluate with draws=20 (--draws 20)",
    ),
    "one by one as in a batch": (
        (_alone, _BATCH),
        "difference of logits alone and in a batch, relative; if large, examples are not judged "
        "by themselves",
    ),
    "monotone in eps": (
        (_monotone, _CHANCE),
        "largest rise of accuracy as eps doubles; above 0 the attack fails somewhere",
    ),
    "reaches zero": (
        (_reaches_zero, _HIDDEN),
        "accuracy when the whole box is allowed; any image can be reached, so above 0 the attack "
        "fails",
    ),
    "many steps beat one": (
        (_many_steps, _CHANCE),
        "accuracy under 20 steps minus that under one; above 0 the steps lose their way",
    ),
    "gradient-free is not stronger": (
        (_gradient_free, _CHANCE),
        "share of examples that Square breaks and gradients do not; if large, gradients mislead: "
        "run it with early_stopping=False (--full), and take the number for an upper bound",
    ),
    "gradients are there": (
        (_lost_gradients, _HIDDEN),
        "share of examples at which the gradient is exactly zero, or no number, whatever the scale "
        "of the logits",
    ),
    "scale of the logits": (
        (_scale, _CHANCE),
        "change of accuracy under attack when logits are multiplied by 0.01 and 1,000",
    ),
    "cross-entropy sees": (
        (_blind, _CHANCE),
        "by how much an attack on plain cross-entropy would overstate robustness",
    ),
}
"""Name, measure with the largest number that passes, and meaning of every check."""


_OF_DRAWS = (
    "share of examples that two means over the draws decide differently; if large, take more draws"
)
_ONLY_SCALE = (
    "by how much an attack on plain cross-entropy would overstate robustness, for the scale of the "
    "logits alone; the attacks here do not depend on it, and the number stands"
)


def _checked(name: str, sample: _Sample) -> Check:
    (measure, most), meaning = CHECKS[name]
    finding: Finding
    try:
        measured = measure(sample)
        if name == "deterministic" and sample.draws > 1:
            most, meaning = _DECISIONS, _OF_DRAWS
        elif most in (_CHANCE, _HIDDEN):  # shares of examples, some of which chance decides
            most += sample.chance
        finding = "passed" if measured <= most else "suspicious"
        unseen = name == "cross-entropy sees" and finding == "suspicious"
        if unseen and _blind_at_unit_scale(sample) <= most:
            finding, meaning = "noted", _ONLY_SCALE
    except Exception as error:  # the user's model is run, which may raise anything
        first = next(iter(str(error).splitlines()), "")
        said = f"not measured, {type(error).__name__}: {first}".removesuffix(": ")
        return Check(name, "suspicious", None, said)
    return Check(name, finding, measured, meaning)


def numbers_check(undefined: int, examples: int) -> Check:
    """Say how many examples had logits that are no numbers, as they were or where they broke."""
    return Check(
        "logits are numbers",
        "suspicious" if undefined else "passed",
        undefined / examples,
        "share of examples with a logit that is NaN or infinite, as they are or where an attack "
        "ended; they count as wrong, though the model decided nothing",
    )
