import argparse
import builtins
import collections
import copyreg
import importlib
import io
import os
import pickle
import pickletools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lata_lightning.errors import CorruptFileError
from lata_lightning.store.pickles import Call, Global, Key, Persistent, kind_of, mapping, read_pickle

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
SHARED = [1, 2]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "value",
    [
        None, True, False, 0, -1, 255, 65536, 2**31, -(2**70), 1.5, float("inf"), "", "text", "ü\n\\", b"", b"\x00\xff",
        (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4),
        [], [1, [2]], {}, {"a": {"b": (1, None)}, 3: [4]}, list(range(2000)),
        {str(number): number for number in range(2000)}, "x" * 70000,
        [SHARED, SHARED], collections.OrderedDict,
    ],
    ids=str,
)  # fmt: skip
def test_plain_values_are_read_as_python_reads_them(value, protocol):
    data = pickle.dumps(value, protocol)
    if value is collections.OrderedDict:
        assert read_pickle(data) == Global("collections", "OrderedDict")
    elif isinstance(value, bytes) and protocol < 3:
        # Before there was an operation for bytes, they were a call.
        assert isinstance(read_pickle(data), Call)
    else:
        assert read_pickle(data) == pickle.loads(data)  # noqa: S301


def test_sets_become_lists_and_tuples():
    assert sorted(read_pickle(pickle.dumps({1, 2}, 4))) == [1, 2]
    assert sorted(read_pickle(pickle.dumps(frozenset([1, 2]), 4))) == [1, 2]


def test_a_list_that_holds_itself_is_read():
    endless = []
    endless.append(endless)
    found = read_pickle(pickle.dumps(endless))
    assert found[0] is found


@pytest.mark.parametrize("kind", [collections.OrderedDict, dict, lambda pairs: collections.defaultdict(list, pairs)])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_kind_of_dictionary_is_a_mapping(kind, protocol):
    assert mapping(read_pickle(pickle.dumps(kind({"a": 1, "b": 2}), protocol))) == {"a": 1, "b": 2}
    assert mapping(read_pickle(pickle.dumps(kind({}), protocol))) == {}


def test_what_is_no_dictionary_is_no_mapping():
    assert mapping([1]) is None
    assert mapping(read_pickle(pickle.dumps(argparse.Namespace(a=1)))) is None


def test_keys_that_are_neither_text_nor_number_are_kept_apart():
    (key,) = read_pickle(pickle.dumps({(1, 2): 3}))
    assert isinstance(key, Key)
    assert key.value == (1, 2)


def test_objects_are_noted_with_their_class_arguments_and_state():
    found = read_pickle(pickle.dumps(argparse.Namespace(lr=1), 4))
    assert found.function == Global("argparse", "Namespace")
    assert found.state == {"lr": 1}
    assert kind_of(found) == "argparse.Namespace"
    assert kind_of(read_pickle(pickle.dumps(Path("/x"), 2))).startswith("pathlib")
    assert kind_of(read_pickle(pickle.dumps(argparse.Namespace(), 0))) == "argparse.Namespace"
    assert kind_of(3) == "int"


# What would run


class Reduce:
    """Asks the reader to call something."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


class Build:
    """Asks the reader to make an object and to hand it a state."""

    def __reduce__(self):
        return (Trap, (), {"armed": True})


class Trap:
    made = 0

    def __new__(cls, *arguments):
        cls.made += 1
        return super().__new__(cls)

    def __init__(self, *arguments):
        type(self).made += 1

    def __setstate__(self, state):
        type(self).made += 1

    def __call__(self, *arguments):
        type(self).made += 1

    def append(self, element):
        type(self).made += 1

    extend = append

    def __setitem__(self, key, value):
        type(self).made += 1

    def __hash__(self):
        type(self).made += 1
        return 0

    def __del__(self):
        type(self).made += 1


def assembled(*parts):
    return b"\x80\x02" + b"".join(parts) + b"."


def exploits(target):
    """Pickles of every kind that is known to run code, all of which would make a file."""
    touch = f"touch {target}"
    code = f"open({str(target)!r}, 'w').close()"
    quoted = code.encode()
    name = __name__.encode()
    yield "os.system", pickle.dumps(Reduce(os.system, touch))
    yield "posix.system by protocol 0", b"cposix\nsystem\n(V" + touch.encode() + b"\ntR."
    yield "builtins.eval", pickle.dumps(Reduce(eval, code))
    yield "builtins.exec", pickle.dumps(Reduce(exec, code))
    yield "compile and exec", pickle.dumps(Reduce(exec, Reduce(compile, code, "x", "exec")))
    yield "subprocess", pickle.dumps(Reduce(subprocess.Popen, ["touch", str(target)]))
    yield "importlib", pickle.dumps(Reduce(importlib.import_module, "antigravity"))
    yield "__import__", pickle.dumps(Reduce(builtins.__import__, "this"))
    yield "getattr", pickle.dumps(Reduce(getattr, Reduce(importlib.import_module, "os"), "system"))
    yield "partial", assembled(b"cfunctools\npartial\ncposix\nsystem\n\x85RX", len(touch).to_bytes(4, "little"), touch.encode(), b"\x85R")
    yield "nested pickle.loads", pickle.dumps(Reduce(pickle.loads, pickle.dumps(Reduce(os.system, touch))))
    yield "nested torch.load", pickle.dumps(Reduce(torch.load, str(target)))
    yield "numpy object array", pickle.dumps(np.array([Reduce(os.system, touch)], dtype=object))
    yield "an import by a name that is none", assembled(b"cno_such_module_anywhere\nname\n)R")
    yield "an import with a side effect", assembled(b"cantigravity\nfly\n)R")
    yield "a name with dots", b"\x80\x04\x8c\x08builtins\x8c\x13__import__.__self__\x93."
    yield "STACK_GLOBAL", b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c" + bytes([len(touch)]) + touch.encode() + b"\x85R."
    yield "INST", b"(S" + repr(touch).encode() + b"\nios\nsystem\n."
    yield "OBJ", assembled(b"(cos\nsystem\nX", len(touch).to_bytes(4, "little"), touch.encode(), b"o")
    yield "NEWOBJ", assembled(b"c", name, b"\nTrap\n)\x81")
    yield "NEWOBJ_EX", b"\x80\x04c" + name + b"\nTrap\n)}\x92."
    yield "BUILD", pickle.dumps(Build())
    yield "BUILD with slots", assembled(b"c", name, b"\nTrap\n)R(}X\x01\x00\x00\x00aK\x01stb")
    yield "APPENDS", assembled(b"c", name, b"\nTrap\n)R(K\x01e")
    yield "SETITEMS", assembled(b"c", name, b"\nTrap\n)R(K\x01K\x02u")
    yield "a key that hashes", assembled(b"}c", name, b"\nTrap\n)RK\x02s")
    yield "an extension", assembled(b"\x82\xf0")
    yield "a persistent id that is a call", assembled(b"cos\nsystem\nX", len(touch).to_bytes(4, "little"), touch.encode(), b"\x85RQ")
    yield "a state dict that is a call", pickle.dumps({"state_dict": Reduce(eval, code)})
    yield "copyreg", pickle.dumps(Reduce(copyreg._reconstructor, Trap, object, None))
    yield "code in a text", pickle.dumps(quoted)


EXPLOITS = dict(exploits("/made/by/an/exploit"))


@pytest.mark.parametrize("name", EXPLOITS)
def test_no_exploit_runs_or_imports_anything(tmp_path, name):
    target = tmp_path / "made"
    data = dict(exploits(target))[name]
    Trap.made, before = 0, set(sys.modules)
    read_pickle(data)
    assert not target.exists()
    assert Trap.made == 0
    assert set(sys.modules) == before


def test_the_exploits_do_run_where_python_reads_them(tmp_path):
    target = tmp_path / "made"
    for name in ("os.system", "builtins.eval", "STACK_GLOBAL", "INST", "OBJ", "partial", "nested pickle.loads", "numpy object array"):
        pickle.loads(dict(exploits(target))[name])  # noqa: S301
        assert target.exists(), name
        target.unlink()
    Trap.made = 0
    for name in ("NEWOBJ", "BUILD", "APPENDS", "SETITEMS", "a key that hashes"):
        pickle.loads(EXPLOITS[name])  # noqa: S301
    assert Trap.made > 5


# Damage


@pytest.mark.parametrize(
    "data",
    [
        b"", b".", b"\x80", b"\x80\x02", b"\x80\x02h\x05.", b"\x80\x02K\x01e.", b"\x80\x02(.", b"\x80\x02)(K\x01e.",
        b"\x80\x02K\x01K\x01s.", b"\x80\x02\xff.", b"garbage",
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fx.", b"\x80\x02X\xff\xff\xff\x7fx.",
        b"\x80\x02\x8b\xff\xff\xff\x7f.", b"\x80\x05\x97.", b"\x80\x05N\x98.",
        b"I1x\n.", b"F1x\n.", b"Sx\n.", b"\x80\x02(K\x01d.", b"\x80\x02\x85.", b"\x80\x02\x87.",
    ],
    ids=repr,
)  # fmt: skip
def test_a_damaged_pickle_is_refused(data):
    with pytest.raises(CorruptFileError, match="its pickle is damaged"):
        read_pickle(data)


def test_a_number_in_memory_that_is_far_away_takes_no_memory():
    # Python's own machine would make room for two thousand million entries.
    assert read_pickle(b"\x80\x02K\x01r\xff\xff\xff\x7f0j\xff\xff\xff\x7f.") == 1


def test_very_deep_nesting_is_read():
    deep = b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b"."
    read_pickle(deep)


def test_every_operation_that_python_knows_is_either_read_or_refused():
    for operation in pickletools.opcodes:
        data = b"\x80\x02" + operation.code.encode("latin-1") + b"\x00" * 16 + b"\n\n."
        try:
            read_pickle(data)
        except CorruptFileError:
            continue


def test_a_persistent_reference_is_noted():
    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", 1) if value == "far" else None

    for protocol in (1, 2, 4):
        stream = io.BytesIO()
        Pickler(stream, protocol).dump(["far"])
        assert read_pickle(stream.getvalue()) == [Persistent(("storage", 1))]
