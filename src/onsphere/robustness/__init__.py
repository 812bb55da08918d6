"""Attacks on classifiers, robust accuracy that masking cannot fool, and what layers amplify."""

from onsphere.robustness.amplification import amplification
from onsphere.robustness.amplified import Amplification, LayerGain, Quantiles
from onsphere.robustness.apgd import apgd, apgd_targeted
from onsphere.robustness.attacks import fgsm, pgd
from onsphere.robustness.correctness import accuracy, correct, robust_accuracy, withstands
from onsphere.robustness.evaluate import evaluate
from onsphere.robustness.evaluation import (
    Check,
    Evaluation,
    EvaluationError,
    Proportion,
    Stage,
)
from onsphere.robustness.fab import fab
from onsphere.robustness.losses import (
    LOSSES,
    cross_entropy,
    dlr,
    margin,
    targeted_dlr,
    tempered_cross_entropy,
)
from onsphere.robustness.slope import Slopes, local_slope
from onsphere.robustness.spectrum import top_singular
from onsphere.robustness.square import square
from onsphere.robustness.suite import ATTACKS, SUITES, Budget
from onsphere.robustness.threat import Threat

__all__ = [
    "ATTACKS",
    "LOSSES",
    "SUITES",
    "Amplification",
    "Budget",
    "Check",
    "Evaluation",
    "EvaluationError",
    "LayerGain",
    "Proportion",
    "Quantiles",
    "Slopes",
    "Stage",
    "Threat",
    "accuracy",
    "amplification",
    "apgd",
    "apgd_targeted",
    "correct",
    "cross_entropy",
    "dlr",
    "evaluate",
    "fab",
    "fgsm",
    "local_slope",
    "margin",
    "pgd",
    "robust_accuracy",
    "square",
    "targeted_dlr",
    "tempered_cross_entropy",
    "top_singular",
    "withstands",
]
