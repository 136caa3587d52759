"""The parser of one command: flags anywhere on the line, and one-line errors that name the nearest choice."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from decimal import Decimal
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin

from jsonargparse import ArgumentParser, DefaultHelpFormatter
from jsonargparse.typing import PositiveInt

from lata_lightning.cli.shipped import recipe
from lata_lightning.errors import LataError, nearest

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?(inf|nan)", re.IGNORECASE)
_TRUTH = ("true", "false")
# What the parser library says, as far as it is read here and by the parser of `lata fit`.
MISSING = re.compile(r"following arguments are required: (.+)")
UNRECOGNISED = re.compile(r"unrecognized arguments: (.+)")
KEY = re.compile(r'[Kk]ey "([^"]+)"')
VALUE = re.compile(r"(?:Got|Given) value: (.*)")
_WANTED = {float: "a number", int: "a whole number", PositiveInt: "a whole number above 0", bool: "true or false", str: "a text"}


class CommandHelp(DefaultHelpFormatter):
    """Help text with choices and defaults in words, without Python's names of types."""

    def _get_help_string(self, action: Any) -> str:
        text = action.help or ""
        if action.required or action.default in (None, [], "==SUPPRESS=="):
            return text
        shown = str(action.default).lower() if isinstance(action.default, bool) else action.default
        shown = " ".join(map(str, shown)) if isinstance(shown, list) else shown
        return f"{text} Default: {shown}."


class CommandParser(ArgumentParser):
    """Parses the arguments of one command.

    Args:
        name: The command; usage and errors begin with ``lata NAME``.
        description: First paragraph of the help.
        examples: Command lines that the help ends with.

    Attributes:
        types: Type by argument, without "or None".
        required: The arguments that must be given.
    """

    def __init__(self, name: str, description: str, examples: Sequence[str] = ()) -> None:
        self.types: dict[str, Any] = {}
        self.required: set[str] = set()
        epilog = "examples:\n" + "\n".join(f"  {line}" for line in examples) if examples else None
        super().__init__(prog=f"lata {name}", description=description, epilog=epilog, formatter_class=_Formatter)

    def add_argument(self, *names: Any, **settings: Any) -> Any:
        """Add an argument as ``ArgumentParser`` does; record its type for messages, and show the choices of a literal as the name of its value."""
        kind = _without_none(settings.get("type"))
        if get_origin(kind) is Literal and "metavar" not in settings and names[0].startswith("-"):
            settings["metavar"] = "|".join(map(str, get_args(kind)))
        if names[0] == "--output":
            settings.setdefault("metavar", "DIR")
        action = super().add_argument(*names, **settings)
        self.types[action.dest] = kind
        if settings.get("required") or (not action.option_strings and action.nargs not in ("?", "*")):
            # The parser library keeps this to itself, to fill in what a configuration file holds.
            self.required.add(action.dest)
        return action

    def format_usage(self) -> str:
        """Return one line with positional arguments, required options, and a placeholder for the others."""
        positional = [f"{action.metavar}..." if action.nargs == "+" else str(action.metavar) for action in self._positional()]
        required = [f"{action.option_strings[0]} {_metavar(action)}" for action in self._optional() if action.dest in self.required]
        return f"usage: {' '.join([self.prog, *positional, *required])} [options]\n"

    def format_help(self, formatter: Any = None) -> str:
        """Return the help, which begins with the one-line usage."""
        return f"{self.format_usage()}\n{super().format_help()}"

    def arranged(self, arguments: Sequence[str]) -> list[str]:
        """Return the same arguments with positional ones first, wherever the options were.

        An option with several numbers ends at the first word that is no number, one with several texts at the next option. A switch without a
        word behind it is switched on.
        """
        positional: list[str] = []
        options: list[str] = []
        words = iter(enumerate(arguments))
        for number, word in words:
            if word == "--":
                positional += arguments[number + 1 :]
                break
            if not word.startswith("-") or _NUMBER.fullmatch(word):
                positional.append(word)
                continue
            name, joined, value = word.partition("=")
            action = self._action(name)
            name = name if name in action.option_strings else action.option_strings[-1]
            options.append(f"{name}{joined}{value}")
            if joined or action.nargs == 0 or action.dest in ("help", "print_config"):
                continue
            values = list(self._values(action, arguments[number + 1 :]))
            if action.dest == "config":
                values = list(map(self._recipe, values))
            # A negative number with an exponent would be taken for an option.
            options += [f"{Decimal(value):f}" if value.startswith("-") and value[1:2].isdigit() else value for value in values]
            for _ in values:
                next(words, None)
            if not values and self.types.get(action.dest) is bool:
                options[-1] += "=true"
        return [*options, "--", *positional] if positional else options

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line in the words of the command line and exit with status 2."""
        sys.stderr.write(f"{self.prog}: error: {self._plain(message)} See {self.prog} --help.\n")
        self.exit(2)

    def _positional(self) -> list[Any]:
        return [action for action in self._actions if not action.option_strings]

    def _optional(self) -> list[Any]:
        return [action for action in self._actions if action.option_strings]

    def _action(self, name: str) -> Any:
        """Return the option of that name, or the only one that begins with it."""
        by_name = {string: action for action in self._optional() for string in action.option_strings}
        if name in by_name:
            return by_name[name]
        begun = {id(action): action for string, action in by_name.items() if string.startswith(name) and len(name) > 2}
        if len(begun) == 1:
            return next(iter(begun.values()))
        self.error(f"there is no option {name}{nearest(name, by_name)}")

    def _values(self, action: Any, rest: Sequence[str]) -> Iterator[str]:
        """Return the words after an option that belong to it."""
        kind, numeric = self.types.get(action.dest), self.types.get(action.dest) in (float, int, PositiveInt)
        for position, word in enumerate(rest):
            is_number = _NUMBER.fullmatch(word) is not None
            ended = word.startswith("-") and not is_number
            # The first word is taken even if it is no number, so that the error is about this option.
            ended = ended or (numeric and position > 0 and not is_number)
            if ended or (kind is bool and word.lower() not in (*_TRUTH, "yes", "no")):
                return
            yield word
            if action.nargs != "+":
                return

    def _plain(self, message: str) -> str:
        """Rephrase a message of the parser library in the words of this command line."""
        missing = MISSING.search(message)
        if missing:
            return f"{' and '.join(self._shown(key) for key in missing[1].split(', '))} must be given."
        bare = re.search(r"argument (?:--?[\w-]+/)?-{0,2}([\w-]+)[^:]*: expected (?:one|at least one) argument", message)
        if bare:
            return self._without_value(bare[1].replace("-", "_"))
        extra = UNRECOGNISED.search(message)
        if extra:
            return f"too many arguments: {extra[1]}."
        entry = re.search(r"Option '([^']+)' is not accepted", message)
        if entry:
            return f"the configuration has an entry {entry[1]!r} that this command does not take{nearest(entry[1], self.types)}"
        key = KEY.search(message)
        value = VALUE.search(message)
        if key and value and key[1] in self.types:
            given = value[1].strip().strip("'\"")
            kind = self.types[key[1]]
            near = nearest(given, map(str, get_args(kind))) if get_origin(kind) is Literal else ""
            return f"{self._shown(key[1], False)} takes {self._wanted(key[1])}, got {given!r}{near or '.'}"
        if key and key[1] == "config":
            return f"--config: {first_sentence(message.partition(':')[2])}"
        return first_sentence(message)

    def _recipe(self, name: str) -> str:
        try:
            return recipe(name)
        except LataError as error:
            self.error(str(error))

    def _without_value(self, key: str) -> str:
        wanted = self._wanted(key)
        return f"{self._shown(key, False)} needs a value{'' if wanted == _WANTED[str] else f': {wanted}'}."

    def _shown(self, key: str, with_value: bool = True) -> str:
        """Return an argument as a user types it."""
        for action in self._actions:
            if action.dest == key:
                if not action.option_strings:
                    return f"{action.metavar}..." if action.nargs == "+" else str(action.metavar)
                return f"{action.option_strings[-1]} {_metavar(action)}" if with_value else str(action.option_strings[-1])
        return key

    def _wanted(self, key: str) -> str:
        kind = self.types.get(key)
        if get_origin(kind) is Literal:
            choices = list(map(str, get_args(kind)))
            return f"{', '.join(choices[:-1])} or {choices[-1]}" if len(choices) > 1 else choices[0]
        return _WANTED.get(kind, "a text")


class _Formatter(CommandHelp):
    """Keeps the lines of the examples, and leaves the usage to the parser."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("examples:") else super()._fill_text(text, width, indent)

    def _format_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any) -> str:
        return ""


def _without_none(kind: Any) -> Any:
    """Return X for ``X | None``, and any other type itself."""
    kinds = [part for part in get_args(kind) if part is not NoneType]
    return kinds[0] if get_origin(kind) is not Literal and NoneType in get_args(kind) and len(kinds) == 1 else kind


def _metavar(action: Any) -> str:
    return str(action.metavar or action.dest.upper())


def first_sentence(text: str) -> str:
    """Return the first line of a message that is not blank, as a sentence."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "the arguments cannot be understood")
    return line if line.endswith((".", "?")) else f"{line}."
