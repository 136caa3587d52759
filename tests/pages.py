"""The blocks of code in README.md and in the pages under docs/, and how a test runs them."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
# The page of all commands is made when the site is built.
_MADE = {"_build", "commands.generated.md"}
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md") if not _MADE & {*page.parts})]
RUN = ("python", "bash")
SHOWN = ("", "text", "json")
_NOT_RUN = re.compile(r"<!-- not run: (.+) -->")
_SCRIPT = re.compile(r"# (\w+\.py)$")


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its text, and why it is not to be run (from a comment ``<!-- not run: reason -->`` above it), if so."""

    language: str
    text: str
    not_run: str | None

    @property
    def script(self):
        """The file a Python block names in its first line, such as ``# train.py``; None if it names none."""
        named = _SCRIPT.match(self.text.split("\n", 1)[0])
        return None if named is None or self.language != "python" else named[1]


def read(page):
    return (ROOT / page).read_text("utf-8")


def blocks(page):
    """All fenced blocks of a page but the directives of the site, in order."""
    found, above, fence, language, lines = [], "", None, "", []
    for line in read(page).splitlines():
        mark = re.match(r"(`{3,})(.*)$", line)
        if fence is None and mark:
            fence, language, lines = mark[1], mark[2].strip(), []
        elif fence is not None and line == fence:
            reason = _NOT_RUN.match(above)
            if not language.startswith("{"):
                found.append(Block(language, "".join(f"{kept}\n" for kept in lines), None if reason is None else reason[1]))
            fence, above = None, ""
        elif fence is not None:
            lines.append(line)
        elif line.strip():
            above = line
    assert fence is None, f"{page} has a block that does not end"
    return found


def prose(page):
    """A page without its fenced blocks."""
    return re.sub(r"^(`{3,})[^`]*\n.*?^\1$", "", read(page), flags=re.MULTILINE | re.DOTALL)


def run(block, folder):
    """What a block prints when it is run in a folder; a script runs under its name, in the file it names."""
    if block.language == "bash":
        command = ["bash", "-euc", block.text]
    elif block.script is not None:
        command = [sys.executable, block.script]
    else:
        command = [sys.executable, "-c", block.text]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{block.text}\n{done.stderr[-3000:]}"
    return done.stdout


def run_all(page, folder, already):
    """Run the blocks of a page in order, all its scripts at hand; what each printed.

    Args:
        page: Its path.
        folder: Where to run them.
        already: What blocks printed that were run in this folder before, by block; they are not run again, and new ones are added.
    """
    for block in blocks(page):
        if block.script is not None:
            (folder / block.script).write_text(block.text)
    printed = []
    for block in blocks(page):
        if block.language in RUN and block.not_run is None:
            if block not in already:
                already[block] = run(block, folder)
            printed.append(already[block])
    return printed
