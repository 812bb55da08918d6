"""The one error that a user's mistake raises: a clear line, never a traceback at the terminal."""

__all__ = ["OnsphereError"]


class OnsphereError(Exception):
    """Something the user gave cannot be used.

    The message is one line that says what was given, what is allowed and how to mend it. The
    command line prints it and exits with code 2.
    """


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
