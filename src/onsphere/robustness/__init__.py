"""Attacks on classifiers, and accuracy under them."""

from onsphere.robustness.attacks import fgsm, pgd
from onsphere.robustness.correctness import accuracy, correct, robust_accuracy, withstands
from onsphere.robustness.losses import LOSSES, cross_entropy, dlr, margin
from onsphere.robustness.threat import Threat

__all__ = [
    "LOSSES",
    "Threat",
    "accuracy",
    "correct",
    "cross_entropy",
    "dlr",
    "fgsm",
    "margin",
    "pgd",
    "robust_accuracy",
    "withstands",
]
