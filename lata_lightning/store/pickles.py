"""Pickles read as data: no class is imported, and nothing is called.

A pickle is a program for a small stack machine. Python's own machine looks up the classes and functions that the program names, and calls them.
This one pushes a note of each name and of each call on its stack instead, so a pickle cannot run anything.
"""

from __future__ import annotations

import pickletools
from typing import IO, Any, NamedTuple, Protocol, cast

from lata_lightning.errors import CorruptFileError

# Operations whose argument is the value they push.
_LITERALS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "FLOAT", "BINFLOAT",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
# Errors that a damaged pickle can cause; a warning where warnings are errors.
DAMAGE = (DeprecationWarning, ValueError, LookupError, TypeError, AttributeError, EOFError, OverflowError, RecursionError, MemoryError)
_MARK = object()


class Readable(Protocol):
    """Bytes with a position."""

    def read(self, size: int, /) -> bytes:
        """Return the next bytes, fewer at the end."""

    def readline(self) -> bytes:
        """Return the bytes up to the next line break."""

    def tell(self) -> int:
        """Return the position of the next byte."""


class Global(NamedTuple):
    """The name of a class or function, which is not looked up."""

    module: str
    name: str


class Persistent(NamedTuple):
    """A reference to something outside the pickle, as torch makes to the values of a tensor."""

    content: Any


class Call:
    """A call that a pickle asks for and that is not made.

    Attributes:
        function: What it would call; a ``Global``, unless the pickle is odd.
        arguments: What it would pass.
        items: Entries it would set in the result, as in a dictionary.
        elements: Elements it would add to the result, as to a list.
        state: The state it would give the result; None if it gives none.
    """

    def __init__(self, function: object, arguments: tuple[Any, ...]) -> None:
        self.function, self.arguments = function, arguments
        self.items: dict[Any, Any] = {}
        self.elements: list[Any] = []
        self.state: Any = None


class Key:
    """A key of a dictionary that is neither text nor number; it is equal to itself only."""

    def __init__(self, value: object) -> None:
        self.value = value


def read_pickle(data: Readable | bytes) -> Any:
    """Return the content of one pickle, with a ``Global`` for each class or function and a ``Call`` for each object that unpickling would make.

    Args:
        data: The pickle. A stream is left after its last byte.

    Returns:
        Texts, numbers, bytes, None, tuples, lists (also for sets), dictionaries, and the notes above.

    Raises:
        CorruptFileError: It is no pickle, or is damaged.
    """
    try:
        return _run(data)
    except DAMAGE as error:
        raise CorruptFileError(f"its pickle is damaged ({type(error).__name__}: {error})") from error


def mapping(value: object) -> dict[Any, Any] | None:
    """Return the entries of a dictionary, whatever its class; None for anything else."""
    if isinstance(value, dict):
        return value
    if not isinstance(value, Call):
        return None
    if value.items:
        return value.items
    if not isinstance(value.function, Global) or not value.function.name.lower().endswith("dict"):
        return None
    pairs = value.arguments[0] if value.arguments and isinstance(value.arguments[0], list) else []
    return {_key(pair[0]): pair[1] for pair in pairs if isinstance(pair, list | tuple) and len(pair) == 2}


def kind_of(value: object) -> str:
    """Return the class of a value, for messages."""
    if not isinstance(value, Call):
        return type(value).__name__
    shown = (
        value.arguments[0]
        if isinstance(value.function, Global) and value.function.module in ("copyreg", "copy_reg") and value.arguments
        else value.function
    )
    return ".".join(shown) if isinstance(shown, Global) else "object"


def _run(data: Readable | bytes) -> Any:
    stack: list[Any] = []
    memory: dict[Any, Any] = {}
    for operation, argument, _ in pickletools.genops(cast(IO[bytes], data)):
        name = operation.name
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memory[argument] = stack[-1]
        elif name == "MEMOIZE":
            memory[len(memory)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memory[argument])
        elif name in _TUPLES:
            stack[-_TUPLES[name] :] = [tuple(_last(stack, _TUPLES[name]))]
        elif name == "STOP":
            return _no_mark(stack.pop())
        elif name not in ("PROTO", "FRAME"):
            _step(stack, name, argument)
    raise EOFError("it has no end")


def _step(stack: list[Any], name: str, argument: Any) -> None:
    """Apply one of the rarer operations to the stack."""
    match name:
        case "MARK":
            stack.append(_MARK)
        case "EMPTY_LIST" | "EMPTY_SET":
            stack.append([])
        case "EMPTY_DICT":
            stack.append({})
        case "TUPLE" | "FROZENSET":
            stack.append(tuple(_since_mark(stack)))
        case "LIST":
            stack.append(_since_mark(stack))
        case "DICT":
            taken = _since_mark(stack)
            stack.append(_pairs(taken))
        case "APPEND":
            element = stack.pop()
            _add(stack[-1], [element])
        case "APPENDS" | "ADDITEMS":
            elements = _since_mark(stack)
            _add(stack[-1], elements)
        case "SETITEM":
            pair = _last(stack, 2)
            del stack[-2:]
            _set(stack[-1], pair)
        case "SETITEMS":
            pairs = _since_mark(stack)
            _set(stack[-1], pairs)
        case "GLOBAL":
            stack.append(Global(*argument.split(" ", 1)))
        case "STACK_GLOBAL":
            module, attribute = _last(stack, 2)
            stack[-2:] = [Global(str(module), str(attribute))]
        case "EXT1" | "EXT2" | "EXT4":
            stack.append(Global("copyreg", f"extension {argument}"))
        case "REDUCE" | "NEWOBJ":
            function, arguments = _last(stack, 2)
            stack[-2:] = [Call(function, arguments if isinstance(arguments, tuple) else (arguments,))]
        case "NEWOBJ_EX":
            function, arguments, keywords = _last(stack, 3)
            stack[-3:] = [Call(function, (arguments, keywords))]
        case "INST":
            stack.append(Call(Global(*argument.split(" ", 1)), tuple(_since_mark(stack))))
        case "OBJ":
            function, *rest = _since_mark(stack)
            stack.append(Call(function, tuple(rest)))
        case "BUILD":
            state = stack.pop()
            # Only the note of a call has a state.
            if isinstance(stack[-1], Call):
                stack[-1].state = state
        case "PERSID":
            stack.append(Persistent(argument))
        case "BINPERSID":
            stack.append(Persistent(stack.pop()))
        case "POP":
            stack.pop()
        case "POP_MARK":
            _since_mark(stack)
        case "DUP":
            stack.append(stack[-1])
        case _:
            raise ValueError(f"the operation {name} is none that a checkpoint needs")


def _no_mark(value: Any) -> Any:
    if value is _MARK:
        raise IndexError("an operation lacks its arguments")
    return value


def _last(stack: list[Any], count: int) -> list[Any]:
    if len(stack) < count:
        raise IndexError("an operation lacks its arguments")
    return stack[-count:]


def _since_mark(stack: list[Any]) -> list[Any]:
    for depth in range(len(stack) - 1, -1, -1):
        if stack[depth] is _MARK:
            taken = stack[depth + 1 :]
            del stack[depth:]
            return taken
    raise IndexError("an operation lacks its arguments")


def _add(target: object, elements: list[Any]) -> None:
    (target.elements if isinstance(target, Call) else _list(target)).extend(elements)


def _list(target: object) -> list[Any]:
    if not isinstance(target, list):
        raise TypeError(f"elements are added to a {type(target).__name__}")
    return target


def _set(target: object, pairs: list[Any]) -> None:
    entries = target.items if isinstance(target, Call) else target
    if not isinstance(entries, dict):
        raise TypeError(f"entries are set in a {type(target).__name__}")
    entries.update(_pairs(pairs))


def _pairs(flat: list[Any]) -> dict[Any, Any]:
    return {_key(key): value for key, value in zip(flat[::2], flat[1::2], strict=True)}


def _key(value: object) -> Any:
    # The hash of a tuple is that of its parts, however deep they are nested.
    return value if isinstance(value, str | int | float | bytes | None) else Key(value)
