"""A parser whose complaints are one line."""

import argparse
import re
import sys
from collections.abc import Sequence
from fractions import Fraction
from textwrap import wrap
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction["Parser"]


_NEGATIVE = re.compile(r"^-([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?(/[0-9]+)?$")
_NUMBERS = re.compile(r"^[-+0-9.eE_/,]*[0-9][-+0-9.eE_/,]*$")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and tells numbers from flags and from other words."""

    def __init__(self, *args: Any, **options: Any) -> None:
        for part in ("description", "epilog"):
            if options.get(part):
                options[part] = fitted(options[part])
        super().__init__(*args, **options)
        self._negative_number_matcher = _NEGATIVE

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse, where an option of several numbers ends before a word that is none."""
        words = sys.argv[1:] if args is None else list(args)
        several = {
            flag
            for action in self._actions
            if action.nargs == argparse.ONE_OR_MORE
            for flag in action.option_strings
        }
        for place in reversed([i for i, word in enumerate(words) if word in several]):
            end = place + 1
            while end < len(words) and _NUMBERS.match(words[end]):
                end += 1
            if end > place + 1:
                words[place:end] = [f"{words[place]}={','.join(words[place + 1 : end])}"]
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Stop with one line and exit code 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def number(text: str) -> float:
    """Read a number or a fraction of two: ``0.03``, ``8/255``."""
    try:
        return float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None


def fitted(text: str, width: int = 79) -> str:
    r"""Wrap a help to the width of a terminal: prose as a whole, an example that is longer alone.

    Example:
        >>> print(fitted("examples:\n  onsphere plan sgd --lr 0.1    what it does", 30).rstrip())
        examples:
          onsphere plan sgd --lr 0.1
              # what it does
    """
    parts = [_fitted_part(part.splitlines(), width) for part in text.strip("\n").split("\n\n")]
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def _fitted_part(lines: list[str], width: int) -> list[str]:
    if not any(line.startswith(" ") for line in lines):
        return wrap(" ".join(lines), width, break_long_words=False, break_on_hyphens=False)
    return [part for line in lines for part in _fitted_line(line, width)]


def _fitted_line(line: str, width: int) -> list[str]:
    if len(line) <= width:
        return [line]
    command, *comment = re.split(r"(?<=\S) {2,}", line, maxsplit=1)
    lines = [command]
    while len(lines[-1]) > width:  # continued as a shell takes it
        flag = lines[-1].rfind(" --", 8, width - 2)
        place = lines[-1].rfind(" ", 0, width - 2) if flag < 0 else flag
        lines[-1:] = [lines[-1][:place] + " \\", "      " + lines[-1][place + 1 :]]
    return [*lines, *("      # " + part for part in comment)]


class Numbers(argparse.Action):
    """Reads several numbers, with spaces or commas between them."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,  # noqa: ARG002
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,  # noqa: ARG002
    ) -> None:
        """Keep the numbers as a list."""
        try:
            found = [number(part) for word in values for part in word.replace(",", " ").split()]
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentError(self, str(error)) from None
        setattr(namespace, self.dest, found)


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
        >>> in_flags("lr is a positive number", argparse.Namespace(lr=-1))
        '--lr is a positive number'
    """
    for option in sorted(vars(options), key=len, reverse=True):
        flag = "--" + option.replace("_", "-")
        message = re.sub(rf"`{option}`", flag, message)
        message = re.sub(rf"^{option}(?= (?:is|are|must|takes|needs)\b)", flag, message)
        message = re.sub(rf"\b{option}=(['\"])([^'\"]*)\1", rf"{flag} \2", message)
        message = re.sub(rf"(?<![-\w]){option}=(?=[\w.(-])", f"{flag} ", message)
    return message
