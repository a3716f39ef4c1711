"""Settings of Sphinx: notebooks by myst-nb, docstrings by numpydoc.

Nothing is executed, and the pages ask no other host.
"""

import re
import sys
from html import escape
from importlib.util import find_spec
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from pages import REPO, settings  # noqa: E402

_settings = settings()
project, author, release, copyright = (_settings[k] for k in ("lib_name", "author", "version", "copyright"))
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "sphinx.ext.mathjax",
    "numpydoc",
    "sphinx_copybutton",
]
default_role = "py:obj"  # `name` in a docstring is a link where it can be one
exclude_patterns = ["**.ipynb_checkpoints", "_notebooks/**"]

nb_execution_mode = "off"
nb_code_prompt_show = "Show the {type}"
nb_code_prompt_hide = "Hide the {type}"
nb_ipywidgets_js = {}  # else a script of another host on every page with a widget
nb_merge_streams = True
nb_render_markdown_format = "myst"  # outputs of type Markdown may hold tables
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist", "attrs_inline"]
myst_heading_anchors = 4

numpydoc_show_class_members = False
autodoc_typehints = "none"
autodoc_member_order = "bysource"

# MathJax 3 in one file without fonts, from a wheel: the formulas need no other host.
_mathjax = Path(find_spec("mathjax").origin).parent / "static" / "mathjax" / "es5" / "tex-svg-full.js"
mathjax_path = _mathjax.name

if (REPO / "references.bib").exists():
    extensions.append("sphinxcontrib.bibtex")
    bibtex_bibfiles = [str(REPO / "references.bib")]

html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["_static", str(_mathjax), "images"]
html_css_files = ["site.css"]
html_js_files = [("site.js", {"defer": "defer"})]
PREVIEW = "ind00009.png"  # the maps of the front page
html_favicon = "_static/icon.svg"
html_show_sphinx = False
copybutton_exclude = ".linenos, .gp, .go"
html_theme_options = dict(
    source_repository=_settings["git_url"],
    source_branch=_settings["branch"],
    source_directory="nbs/",
    top_of_page_buttons=[],
    footer_icons=[dict(name="Source code", url=_settings["git_url"], html="Source code")],
)


def describe(app, pagename, templatename, context, doctree):
    """What search engines and previews of links say of a page."""
    site = f"{_settings['doc_host']}{_settings['doc_baseurl']}"
    values = {
        "og:title": context.get("title", project),
        "og:description": _settings["description"],
        "og:image": f"{site}/_static/{PREVIEW}",
    }
    tags = [f'<meta name="description" content="{escape(_settings["description"])}">']
    tags += [
        f'<meta property="{name}" content="{escape(re.sub("<[^>]*>", "", value))}">'
        for name, value in values.items()
    ]
    context["metatags"] = context.get("metatags", "") + "\n".join(tags)


def name_for_screen_readers(app, pagename, templatename, context, doctree):
    """Mend two names that screen readers read: Furo's captions of the contents, and myst-nb's folded cells.

    The captions are headings without a level, and the label of a folded cell hides its text.
    """
    captions = 'class="caption" role="heading"'
    tree = context.get("furo_navigation_tree")
    if tree:
        context["furo_navigation_tree"] = tree.replace(captions, f'{captions} aria-level="2"')
    body = context.get("body")
    if body:
        context["body"] = body.replace('<summary aria-label="Toggle hidden content">', "<summary>")


def skip_generated(app, what, name, member, skip, options):
    """Leave out the methods that scikit-learn generates on its estimators."""
    generated = name.startswith("set_") and name.endswith("_request")
    return skip or generated or None


def setup(app):
    """Add the static files that were written with the pages, and connect the functions above."""
    app.config.html_static_path.append(str(Path(app.srcdir) / "_static"))
    app.connect("html-page-context", describe)
    app.connect("html-page-context", name_for_screen_readers, priority=900)
    app.connect("autodoc-skip-member", skip_generated)
