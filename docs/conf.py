"""Sphinx configuration: built with every warning an error (tox run -e docs)."""

from importlib.metadata import version as version_of

project = "scrapy-streaming"
author = "the scrapy-streaming contributors"
copyright = "2026, " + author
version = release = version_of("scrapy-streaming")

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"{project} {release}"
myst_heading_anchors = 3
myst_enable_extensions = ["attrs_inline"]  # [R12]{#r12} is an anchor: comments in the code name it

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
# types in signatures are for reading: most are of other packages, or have no page
nitpick_ignore_regex = [(r"py:.*", r".*")]
