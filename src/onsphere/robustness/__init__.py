"""Attacks on classifiers, robust accuracy that masking cannot fool, and what layers amplify."""

from onsphere.robustness.amplification.margin import MarginSlopes, margin_slope
from onsphere.robustness.amplification.measure import amplification
from onsphere.robustness.amplification.result import Amplification, LayerGain
from onsphere.robustness.amplification.singular_values import spectral_norm
from onsphere.robustness.attacks.auto_pgd import apgd, apgd_targeted
from onsphere.robustness.attacks.fab import fab
from onsphere.robustness.attacks.losses import (
    LOSSES,
    cross_entropy,
    dlr,
    margin,
    targeted_dlr,
    tempered_cross_entropy,
)
from onsphere.robustness.attacks.pgd import fgsm, pgd
from onsphere.robustness.attacks.square import square_attack
from onsphere.robustness.attacks.threat_model import Threat
from onsphere.robustness.evaluation.accuracy import (
    accuracy,
    correct_mask,
    robust_accuracy,
    robust_mask,
)
from onsphere.robustness.evaluation.evaluate import evaluate
from onsphere.robustness.evaluation.outputs import mean_over_draws
from onsphere.robustness.evaluation.result import (
    Check,
    Evaluation,
    EvaluationError,
    Proportion,
    Stage,
)
from onsphere.robustness.evaluation.suite import ATTACKS, SUITES, Budget

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
    "MarginSlopes",
    "Proportion",
    "Stage",
    "Threat",
    "accuracy",
    "amplification",
    "apgd",
    "apgd_targeted",
    "correct_mask",
    "cross_entropy",
    "dlr",
    "evaluate",
    "fab",
    "fgsm",
    "margin",
    "margin_slope",
    "mean_over_draws",
    "pgd",
    "robust_accuracy",
    "robust_mask",
    "spectral_norm",
    "square_attack",
    "targeted_dlr",
    "tempered_cross_entropy",
]
