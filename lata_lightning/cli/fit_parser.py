"""The parser behind ``lata fit``: Lightning's own, with errors of one line. A module of its own, as importing Lightning takes seconds."""

from __future__ import annotations

import re
import sys
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from lata_lightning.cli.parsing import KEY, MISSING, UNRECOGNISED, VALUE, first_sentence
from lata_lightning.cli.shipped import located
from lata_lightning.errors import nearest

# Sections whose options are all known; those of model and data depend on the classes that are named.
_KNOWN = ("--trainer.", "--lata.")
_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}


class FitParser(LightningArgumentParser):
    """Parses the arguments of ``lata fit``; wrong ones end with one line and status 2."""

    def parse_args(self, args: Any = None, *rest: Any, **settings: Any) -> Any:
        """Parse as ``LightningArgumentParser`` does, but first refuse unknown options of trainer and callback, naming the nearest known one."""
        for word in args or []:
            name = word.partition("=")[0]
            known = [option for option in self._names() if "." in option]
            if name.startswith(_KNOWN) and not any(name == option or name.startswith(f"{option}.") for option in known):
                self.error(f"there is no option {name}{nearest(name, known)}")
        return located(super().parse_args(args, *rest, **settings))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line and exit with status 2."""
        sys.stderr.write(f"lata fit: error: {_plain(message)} See lata fit --help.\n")
        self.exit(2)

    def _names(self) -> list[str]:
        """Return the long options of this parser and of its subcommands."""
        parsers = [self, *(self._subcommands_action.choices.values() if self._subcommands_action else ())]
        return [option for parser in parsers for option in parser._option_string_actions if option.startswith("--")]


def _plain(message: str) -> str:
    key = KEY.search(message)
    option = f"--{key[1]}" if key else ""
    missing = MISSING.search(message)
    if missing:
        # Without a key these are arguments of the module or of the data, as each class is parsed by itself.
        names = [f"{option or _section(name)}.{name}" for name in missing[1].split(", ")]
        return f"{' and '.join(names)} must be given, by a recipe (--config FILE) or on the command line."
    inner = re.search(r"Problem with given class_path '[^']*':\s*(.+)", message)
    if inner:
        return f"{option}: {first_sentence(inner[1])}"
    extra = UNRECOGNISED.search(message)
    if extra:
        option = extra[1].split()[0]
        return f"there is no option {option}{nearest(option, ('--config', '--model.model', '--data.data', '--output', '--ckpt_path'))}"
    value = VALUE.search(message)
    wanted = re.findall(r"Expected an? (?:<class '(\w+)'>|typing\.Literal\[(.*?)\])", message)
    if key and value:
        kinds = [choices.replace("'", "") or _KINDS.get(kind, kind) for kind, choices in wanted if kind != "NoneType"]
        takes = f" takes {' or '.join(dict.fromkeys(kinds))}, got" if kinds else " cannot be"
        return f"{option}{takes} {value[1].strip()!r}."
    return first_sentence(re.sub(r'^Parser key "config":', "--config:", message))


def _section(name: str) -> str:
    return f"--{name}" if name in ("model", "data") else "--model or --data"
