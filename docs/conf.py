"""How Sphinx builds the documentation: ``sphinx-build -W docs build/docs``."""

from __future__ import annotations

from shallowflow import __version__

project = "ShallowFlow"
author = "The ShallowFlow developers"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
root_doc = "index"
myst_heading_anchors = 3
html_theme = "alabaster"
html_theme_options = {"description": "The best way to fine-tune a language model on a small GPU"}
autodoc_typehints = "description"
autodoc_typehints_format = "short"
autodoc_class_signature = "separated"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
