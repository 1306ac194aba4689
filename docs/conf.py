"""Sphinx settings; ``script/test`` builds the pages with every warning an error."""

from __future__ import annotations

import sys
from pathlib import Path

_HERE = Path(__file__).parent
sys.path[:0] = [str(_HERE.parent), str(_HERE / "_ext")]

from pdm.workqueue import __version__  # noqa: E402 - found through the path above

project = "PDM Workqueue"
author = "the PDM Workqueue developers"
copyright = "2026, the PDM Workqueue developers"
version = release = __version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinxcontrib.httpdomain",
    "endpoint_table",
    "reference_tables",
]
exclude_patterns = ["_build"]
html_theme = "alabaster"
html_theme_options = {"description": "A queue that moves research data between storage sites.", "page_width": "1100px"}
html_show_copyright = False
html_show_sourcelink = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
# Long unions of types are clearer one to a line.
maximum_signature_line_length = 100
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# Single backquotes name a thing of the module at hand, as everywhere in the docstrings.
default_role = "literal"
