"""How the documentation is built: ``make docs`` writes ``build/docs/index.html``."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "extensions"), str(HERE.parent / "src")]

from onsphere.version import __version__  # noqa: E402

project = "onsphere"
author = "The onsphere developers"
copyright = author
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "atlas",
    "mathml",
    "reference",
    "tables",
]
exclude_patterns = ["_build"]
highlight_language = "text"
default_role = "code"

# A page may load nothing from elsewhere: no fonts, no scripts. Mathematics is MathML.
html_theme = "furo"
html_title = "onsphere"
html_math_renderer = "mathml"
html_static_path = ["static"]
html_css_files = ["onsphere.css"]
html_show_sourcelink = False
html_copy_source = False
html_show_copyright = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0d67c1", "color-brand-content": "#0d67c1"},
    "dark_css_variables": {"color-brand-primary": "#6cb2f5", "color-brand-content": "#6cb2f5"},
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

myst_enable_extensions = ["dollarmath", "deflist", "attrs_inline", "colon_fence"]
myst_heading_anchors = 3

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_attr_annotations = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
maximum_signature_line_length = 80
python_use_unqualified_type_names = True
python_display_short_literal_types = True

# Names of other libraries: an inventory of theirs would have to be downloaded.
_OTHERS = (
    "collections contextlib enum fractions jaxtyping numpy pandas pathlib pd rich torch typing"
)
nitpick_ignore_regex = [
    ("py:.*", rf"({'|'.join(_OTHERS.split())})\..*"),
    ("py:class", "TrainerCallback"),
]
