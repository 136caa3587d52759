"""One page with the help of every command, for the site."""

from __future__ import annotations

from lata_lightning.cli.fit import HELP
from lata_lightning.cli.main import COMMANDS, overview, parser_of


def reference() -> str:
    """Return the help of all commands, as ``--help`` prints it, as Markdown."""
    lines = ["# All commands", "", "```text", overview().rstrip(), "```", ""]
    for name, command in COMMANDS.items():
        text = HELP if command.parses_itself else parser_of(name).format_help()
        lines += [f"## lata {name}", "", "```text", text.rstrip(), "```", ""]
    return "\n".join(lines)
