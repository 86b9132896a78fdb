"""How Sphinx builds these pages, by `make docs`."""

import re
from collections.abc import Callable
from pathlib import Path

from docutils.nodes import Node, SkipNode
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

import focaljax

HERE = Path(__file__).parent
REPOSITORY = "https://github.com/focaljax/focaljax/blob/main"

project = "focaljax"
author = "The focaljax authors"
version = release = focaljax.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
# evidence/ is included in pages; jupyter_execute/ is what myst-nb writes beside the output
exclude_patterns = ["_build", "_templates", "evidence", "jupyter_execute"]
templates_path = ["_templates"]

html_theme = "furo"
html_title = f"focaljax {release}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_math_renderer = "mathml"
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False

# --- pages ----------------------------------------------------------------------------------------

myst_enable_extensions = ["dollarmath"]
myst_dmath_double_inline = True
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # a notebook may skip a level
nb_execution_mode = "off"  # the notebooks come with their outputs
nb_merge_streams = True
nb_ipywidgets_js = {}  # nothing is loaded from elsewhere

for notebook in (HERE.parent / "colab").glob("*.ipynb"):
    # a link to another file of the repository leads out of these pages
    other_file = r"\]\((?!https?:)([\w./-]+\.(?:md|py|toml|txt)(?:#[\w-]*)?)\)"
    text = re.sub(other_file, rf"]({REPOSITORY}/colab/\1)", notebook.read_text("utf-8"))
    copy = HERE / "notebooks" / notebook.name
    if not copy.exists() or copy.read_text("utf-8") != text:
        copy.write_text(text, "utf-8")

# --- the API, from docstrings ---------------------------------------------------------------------

add_function_parentheses = False
add_module_names = False
autodoc_typehints = "none"  # Args says it in words
autosummary_generate = True
default_role = "py:obj"  # a single backquote: a link where it names a function
napoleon_numpy_docstring = False
napoleon_use_rtype = False


# --- mathematics, as MathML: a browser shows it without a script ----------------------------------


def math_visitor(as_block: bool) -> Callable[[HTML5Translator, Node], None]:
    """What writes a formula; one that docutils cannot read is a warning, and stays TeX."""

    def visit(translator: HTML5Translator, node: Node) -> None:
        try:
            math = tex2mathml(node.astext(), as_block=as_block)
        except MathError as error:
            logging.getLogger(__name__).warning("math: %s", error, location=node)
            math = translator.encode(node.astext())
        # spaces as TeX has them: none inside |x|, a thin one in log p
        math = re.sub(
            r"<mo[^>]*>\|</mo>", '<mo stretchy="false" lspace="0" rspace="0">|</mo>', math
        )
        bare = r"(?<=&ApplyFunction;</mo>)(?!\s*<mo[^>]*>\()"
        math = re.sub(bare, '<mspace width=".17em"></mspace>', math)
        translator.body.append(f'<div class="math">{math}</div>' if as_block else math)
        raise SkipNode

    return visit


def setup(app: Sphinx) -> None:
    """What is not Sphinx's own."""
    renderers = ((math_visitor(as_block), None) for as_block in (False, True))
    app.add_html_math_renderer("mathml", *renderers)
