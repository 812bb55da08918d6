"""A parser whose complaints are one line."""

import argparse
import re
from fractions import Fraction
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction["Parser"]


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Stop with one line and exit code 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def number(text: str) -> float:
    """Read a number or a fraction of two: ``0.03``, ``8/255``."""
    try:
        return float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None


def whole(text: str) -> int:
    """Read a whole number as people write them: ``100000``, ``1e5``, ``100_000``, ``100,000``."""
    try:
        value = Fraction(re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", text))
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
    if value.denominator != 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number")
    return int(value)


def keyword(text: str) -> str:
    """Read the name of something, in which capitals do not matter."""
    return text.lower()


def in_flags(message: str, options: argparse.Namespace) -> str:
    """Say in the words of the command line what the library says in those of Python.

    Example:
        >>> in_flags("give a larger `tolerance`, or radius='unit'", argparse.Namespace(
        ...     tolerance=1, radius="unit"))
        'give a larger --tolerance, or --radius unit'
    """
    for option in sorted(vars(options), key=len, reverse=True):
        flag = "--" + option.replace("_", "-")
        message = re.sub(rf"`{option}`", flag, message)
        message = re.sub(rf"\b{option}=(['\"])([^'\"]*)\1", rf"{flag} \2", message)
        message = re.sub(rf"(?<![-\w]){option}=(?=[\w.(-])", f"{flag} ", message)
    return message
