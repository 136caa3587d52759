"""The shape of the package: which room may know of which, and what it shows to the world."""

import ast
import subprocess
import sys
from pathlib import Path

import lata_lightning

PACKAGE = Path(lata_lightning.__file__).parent
# From the top of the house down; imports may only point further down.
ROOMS = [
    "cli", "quickstart", "training", "evaluation", "report", "callbacks", "exports", "merging", "metric", "pictures", "charts", "tables", "linearity",
    "projection", "store", "weighting", "alignment", "combining", "sums", "pieces", "low_rank", "compiled", "moments", "layers", "errors",
]  # fmt: skip


def imports(file):
    """Modules a file imports when it runs; imports for type checkers alone do not count."""
    tree = ast.parse(file.read_text())
    checked = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.dump(branch.test)
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if id(node) in checked:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def room_of(file):
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def files():
    return [file for file in PACKAGE.rglob("*.py") if file.parent != PACKAGE or file.name not in ("__init__.py", "__main__.py")]


def test_every_room_is_listed():
    assert {room_of(file) for file in files()} == set(ROOMS)


def test_imports_point_down_only():
    upward = [
        (str(file.relative_to(PACKAGE)), module)
        for file in files()
        for module in imports(file)
        if module.startswith("lata_lightning.") and ROOMS.index(module.split(".")[1]) < ROOMS.index(room_of(file))
    ]
    assert upward == []


def test_nothing_below_the_callbacks_knows_lightning():
    below = ROOMS[ROOMS.index("callbacks") + 1 :]
    knowing = [
        str(file) for file in files() if room_of(file) in below and any(module.split(".")[0] == "lightning" for module in imports(file))
    ]
    assert knowing == []


def test_every_exported_name_is_there():
    assert all(getattr(lata_lightning, name) is not None for name in lata_lightning.__all__)
    assert set(lata_lightning.__all__) == set(lata_lightning._HOMES)


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(lata_lightning, "LATA")


def test_importing_the_package_imports_no_framework():
    code = "import sys, lata_lightning; print([name for name in ('torch', 'lightning', 'transformers') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
