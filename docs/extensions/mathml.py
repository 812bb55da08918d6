"""Mathematics as MathML: browsers draw it themselves, without scripts, fonts or a network.

What ``latex2mathml`` gives is mended where browsers (MathML Core) want it otherwise, and every
formula keeps its LaTeX as ``alttext``, for screen readers and for browsers without MathML.
"""

import itertools
import re
import unicodedata
from typing import Any
from xml.etree import ElementTree

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging

LOG = logging.getLogger(__name__)
NAMESPACE = "http://www.w3.org/1998/Math/MathML"
ElementTree.register_namespace("", NAMESPACE)
FENCES = {"⟨": "prefix", "⟩": "postfix"}
ALPHABETS = {"double-struck": "DOUBLE-STRUCK", "bold": "BOLD"}


def mathml(latex: str, display: str) -> str:
    """Return a formula as a ``<math>`` element.

    Args:
        latex: the formula.
        display: ``"inline"`` or ``"block"``.

    Raises:
        ValueError: it uses something that does not come out as MathML.
    """
    spelled = re.sub(r"\\mathrm\{(\w{2,})\}", r"\\operatorname{\1}", latex)
    try:
        root = ElementTree.fromstring(convert(spelled, display=display))
    except Exception as error:
        raise ValueError(f"no MathML for {latex!r}: {error}") from error
    for element in root.iter():
        _mend(element, latex)
    _pair_bars(root)
    root.set("alttext", " ".join(latex.split()))
    return ElementTree.tostring(root, encoding="unicode")


def _mend(element: ElementTree.Element, latex: str) -> None:
    tag, text = element.tag.rpartition("}")[2], element.text or ""
    if tag == "mi" and text in FENCES:
        element.tag = f"{{{NAMESPACE}}}mo"
        element.attrib.update(form=FENCES[text], stretchy="false")
    if "\\" in text or "&" in text:
        raise ValueError(f"no MathML for {text!r} in {latex!r}")
    variant = element.get("mathvariant", "")
    if variant in ALPHABETS:
        del element.attrib["mathvariant"]
        element.text = "".join(_letter(character, ALPHABETS[variant]) for character in text)


def _pair_bars(root: ElementTree.Element) -> None:
    """Say which bars open and which close: a browser would put space around each."""
    bars = [
        operator
        for operator in root.iter(f"{{{NAMESPACE}}}mo")
        if operator.text in ("|", "‖") and "form" not in operator.attrib
    ]
    for bar, form in zip(bars, itertools.cycle(("prefix", "postfix"))):
        bar.attrib.update(form=form, stretchy="false")


def _letter(character: str, alphabet: str) -> str:
    """Return the letter of a mathematical alphabet; MathML Core knows no other way to it."""
    kind = "DIGIT" if character.isdigit() else "CAPITAL" if character.isupper() else "SMALL"
    name = unicodedata.name(character).rpartition(" ")[2]
    for found in (f"MATHEMATICAL {alphabet} {kind} {name}", f"{alphabet} {kind} {name}"):
        try:
            return unicodedata.lookup(found)
        except KeyError:
            continue
    return character


def _write(translator: Any, node: nodes.Element, latex: str, display: str) -> str:
    try:
        return mathml(latex, display)
    except ValueError as error:
        LOG.warning("%s", error, location=node, type="math")
        return f"<code>{translator.encode(latex)}</code>"


def _inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(_write(translator, node, node.astext(), "inline"))
    raise nodes.SkipNode


def _display(translator: Any, node: nodes.math_block) -> None:
    formula = _write(translator, node, node.astext(), "block")
    translator.body.append(f'<div class="math-display" tabindex="0">{formula}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    """Offer ``html_math_renderer = "mathml"``."""
    app.add_html_math_renderer("mathml", (_inline, None), (_display, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
