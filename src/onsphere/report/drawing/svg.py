"""SVG that can stand inside a page: nothing foreign, no clashing ids, words for screen readers."""

import re
from html import escape
from xml.etree import ElementTree

from onsphere.report.number import clean

_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_LONG_NUMBER = re.compile(r"(-?\d+\.\d{2})\d+")
_FAMILY = re.compile(r"font-family:[^;]*;?\s*")
_NAMESPACE = re.compile(r"^\{[^}]*\}")
# Attributes of lengths in points: a hundredth is finer than any screen or printer.
_LENGTHS = frozenset({"d", "x", "y", "width", "height", "transform"})
# Those who show the page choose the letters; these widths are the ones the layout was made for.
_LETTERS = "DejaVu Sans, Verdana, sans-serif"


def inline_svg(drawing: bytes, key: str, title: str, description: str) -> str:
    """Turn a drawing of matplotlib into an ``<svg>`` element for a page.

    The prolog, metadata, style sheet, comments, namespaces and unused ids go; the ids that are
    used get names made from ``key``; coordinates are rounded to a hundredth of a point.

    Args:
        drawing: the SVG file.
        key: letters, digits and hyphens, used once in a page.
        title: the name of the picture.
        description: what it shows.

    Returns:
        The element as text.

    Raises:
        ValueError: the drawing refers to something outside itself.
    """
    root = ElementTree.fromstring(drawing)
    for parent in root.iter():
        for child in [c for c in parent if _name(c.tag) in {"metadata", "style"}]:
            parent.remove(child)
    names = {old: f"{key}-{i}" for i, old in enumerate(_used_ids(root))}
    for element in root.iter():
        element.tag = _name(element.tag)
        element.attrib = _attributes(element.attrib, names)
    inside = "".join(ElementTree.tostring(e, encoding="unicode") for e in _unwrapped(root))
    inside = re.sub(r"\s*\n\s*", " ", inside)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{root.attrib["viewBox"]}" '
        f'width="{root.attrib["width"]}" height="{root.attrib["height"]}" role="img" '
        f'aria-labelledby="{key}-title {key}-desc" font-family="{_LETTERS}" '
        'stroke-linejoin="round" stroke-linecap="butt">'
        f'<title id="{key}-title">{escape(clean(title))}</title>'
        f'<desc id="{key}-desc">{escape(clean(description))}</desc>{inside}</svg>'
    )


def _name(tag: str) -> str:
    return _NAMESPACE.sub("", tag)


def _used_ids(root: ElementTree.Element) -> list[str]:
    """List what is referred to inside the drawing, in order and once."""
    used: dict[str, None] = {}
    for element in root.iter():
        for name, value in element.attrib.items():
            used |= dict.fromkeys(_REFERENCE.findall(value))
            if _name(name) == "href" and not value.startswith("data:image/png;base64,"):
                if not value.startswith("#"):
                    raise ValueError(f"the drawing refers to {value!r}, outside itself")
                used[value[1:]] = None
    return list(used)


def _attributes(attributes: dict[str, str], names: dict[str, str]) -> dict[str, str]:
    """Rename ids and references, round lengths, leave letters to the page."""
    result = {}
    for full, value in attributes.items():
        name = _name(full)
        if name == "id":
            if value in names:
                result["id"] = names[value]
        elif name == "href" and value.startswith("#"):
            result["href"] = f"#{names[value[1:]]}"
        elif name == "style":
            result["style"] = _FAMILY.sub("", value)
        elif name in _LENGTHS:
            result[name] = _LONG_NUMBER.sub(r"\1", value)
        else:
            result[name] = _REFERENCE.sub(lambda m: f"url(#{names[m[1]]})", value)
    return result


def _unwrapped(root: ElementTree.Element) -> list[ElementTree.Element]:
    """Return the children of the root without definitions that have become empty."""
    return [e for e in root if not (e.tag == "defs" and len(e) == 0)]
