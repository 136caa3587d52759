"""How Sphinx builds the site: ``make docs``."""

import os
from pathlib import Path

# Reading docstrings imports the package; nothing of that may ask the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from lata_lightning.vectors.manifest import library_versions

project = "lata_lightning"
author = "The lata_lightning maintainers"
project_copyright = author
release = library_versions()["lata_lightning"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
root_doc = "index"

# Titles are link targets in every page, as on the pages where the sources are shown: [limits](limits.md#training).
myst_heading_anchors = 3
# What the package exports has two names, one here and one in its module; a short name in an annotation means either, which is the same page.
suppress_warnings = ["ref.python"]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"{project} {release}"
html_copy_source = False
html_show_sphinx = False
html_static_path = ["_static"]
html_css_files = ["wide.css"]
# Dashes, and no curly quotation marks.
smartquotes_action = "D"


def write_commands(app):
    """Write the page of all commands, from their parsers."""
    from lata_lightning.cli.reference import reference

    page = Path(app.srcdir) / "commands.generated.md"
    if not page.is_file() or page.read_text("utf-8") != reference():
        page.write_text(reference(), "utf-8")


def setup(app):
    """Leave out the fields of named tuples as members: the docstring of the class says what they are."""
    app.connect("builder-inited", write_commands)
    app.connect("autodoc-skip-member", lambda *event: True if str(event[3].__doc__).startswith("Alias for field number") else None)
