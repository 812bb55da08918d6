"""Text that any format can hold."""

import unicodedata

_NONCHARACTERS = 0xFFFE


def clean(text: str) -> str:
    r"""Replace what cannot be shown by spaces: control characters, lone surrogates, noncharacters.

    XML has no way to write these, so one of them in a record would make a picture unreadable.

    Example:
        >>> clean("a\x00b\ud800c\nd")
        'a b c\nd'
    """
    return "".join(c if c in "\n\t" or _can_be_shown(c) else " " for c in text)


def _can_be_shown(c: str) -> bool:
    last_of_plane = ord(c) & _NONCHARACTERS == _NONCHARACTERS
    return unicodedata.category(c) not in {"Cc", "Cs"} and not last_of_plane
