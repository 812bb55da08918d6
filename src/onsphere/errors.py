"""The one error that a user's mistake raises: a clear line, never a traceback at the terminal."""

from collections.abc import Iterable

__all__ = ["OnsphereError"]


class OnsphereError(Exception):
    """Something the user gave cannot be used.

    The message is one line that says what was given, what is allowed and how to mend it. The
    command line prints it and exits with code 2.
    """


def choice(
    name: str, given: object, allowed: Iterable[str], error: type[Exception] = ValueError
) -> str:
    """Return one of the words that an option takes, in which capitals do not matter.

    Args:
        name: of the option.
        given: what the user wrote.
        allowed: what there is.
        error: what to raise.

    Raises:
        Exception: of the type asked for, with what is allowed, where ``given`` is none of it.

    Example:
        >>> choice("norm", "Linf", ("linf", "l2"))
        'linf'
        >>> choice("norm", "l3", ("linf", "l2"))
        Traceback (most recent call last):
        ValueError: norm must be "linf" or "l2", got 'l3'
    """
    words = {word.lower(): word for word in allowed}
    found = words.get(given.lower()) if isinstance(given, str) else None
    if found is not None:
        return found
    *others, last = [f'"{word}"' for word in words.values()]
    listed = f"{', '.join(others)} or {last}" if others else last
    raise error(f"{name} must be {listed}, got {given!r}")


def nearest(name: str, allowed: list[str]) -> str:
    """Suggest the nearest allowed name, as the tail of an error message.

    Args:
        name: what was given.
        allowed: what there is.

    Returns:
        ``"; did you mean 'x'?"`` where something is near, and the list of what there is.

    Example:
        >>> nearest("grwth", ["growth", "gain"])
        "; did you mean 'growth'? There are: growth, gain"
    """
    import difflib

    close = difflib.get_close_matches(name.lower(), allowed, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return f"{hint} There are: {', '.join(allowed)}".replace("; There", "; there")
