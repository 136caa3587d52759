"""The site builds without a warning and without a network, and shows its pages without fetching anything from elsewhere."""

import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from pages import ROOT

pytest.importorskip("furo")
pytest.importorskip("myst_parser")

OFFLINE = """
import socket, sys
def refuse(*_, **__):
    raise OSError("the site asked for the network")
socket.getaddrinfo = socket.create_connection = refuse
from sphinx.cmd.build import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-c", OFFLINE, "-q", "-W", "--keep-going", "-d", directory / "doctrees", ROOT / "docs", directory / "html"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return directory / "html"


class Fetched(HTMLParser):
    """What a browser fetches to show a page; links that a reader may follow are not fetched."""

    def __init__(self):
        super().__init__()
        self.addresses = []

    def handle_starttag(self, tag, attrs):
        if tag != "a":
            self.addresses += [value for key, value in attrs if key in ("src", "href", "srcset", "data", "poster") and value]


def test_no_page_fetches_anything_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert {"index.html", "lata.html", "format.html"} <= {page.name for page in pages}
    for page in pages:
        seen = Fetched()
        seen.feed(page.read_text("utf-8"))
        assert seen.addresses
        assert [address for address in seen.addresses if re.match(r"([a-z]+:)?//", address)] == []
    for sheet in site.rglob("*.css"):
        assert re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", sheet.read_text("utf-8")) == []


def test_docstrings_are_on_the_site_with_their_tables(site):
    page = (site / "api/training.html").read_text("utf-8")
    assert "lata_lightning.LATACallback" in page
    assert "under FSDP2 each keeps those of its shards" in page
    assert not re.search(r"={10,}", page)
