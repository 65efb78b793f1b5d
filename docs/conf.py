"""Sphinx: the site of these pages. ``python -m sphinx -W docs docs/_build/html``"""

from __future__ import annotations

import configparser
import os
import re
import sys
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from opd_gym.version import __version__  # noqa: E402

_setup = configparser.ConfigParser()
_setup.read(ROOT / "setup.cfg")
# Where the repository is on the web, the one setting: `url` in setup.cfg. While there is none, links to files that are
# not pages lead to the files beside the built site.
REPOSITORY = _setup["metadata"].get("url", "").rstrip("/")
BRANCH = "main"

project = "opd_gym"
author = _setup["metadata"]["author"]
copyright = author
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}

# The anchors that a code host gives to headings
myst_heading_anchors = 4
myst_url_schemes = ["http", "https", "mailto", "repository"]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_format = "short"
autodoc_typehints_description_target = "documented_params"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

html_title = f"opd_gym {__version__}"
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["opd_gym.css"]
html_theme_options = (
    {"source_repository": REPOSITORY, "source_branch": BRANCH, "source_directory": "docs/"} if REPOSITORY else {}
)
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

_LINK = re.compile(r"(?<=\]\()\.\./(?=[^)\s])")
_logger = logging.getLogger(__name__)


def mark_links(app: Sphinx, docname: str, source: list[str]) -> None:
    """Links that leave docs/ work as they are where the repository is browsed; MyST would copy the files."""
    source[0] = _LINK.sub("repository:", source[0])


def link_to_repository(app: Sphinx, doctree: nodes.document) -> None:
    """What :func:`mark_links` has marked gets the address of the repository."""
    for node in doctree.findall(nodes.reference):
        scheme, _, name = node.get("refuri", "").partition(":")
        if scheme != "repository":
            continue
        path = ROOT / name.partition("#")[0]
        if not path.exists():
            _logger.warning("the repository has no file %s", name, location=node)
        kind = "tree" if path.is_dir() else "blob"
        base = f"{REPOSITORY}/{kind}/{BRANCH}" if REPOSITORY else os.path.relpath(ROOT, app.outdir)
        node["refuri"] = f"{base}/{name}"


def headings_of_docstrings(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings of envs have the headings of Gymnasium's, in Markdown."""
    lines[:] = [re.sub(r"^#+ (.*)$", r".. rubric:: \1", line) for line in lines]
    for i in reversed([i for i, line in enumerate(lines) if line.startswith(".. rubric::")]):
        lines.insert(i + 1, "")


def setup(app: Sphinx) -> None:
    app.connect("source-read", mark_links)
    app.connect("doctree-read", link_to_repository)
    app.connect("autodoc-process-docstring", headings_of_docstrings)
