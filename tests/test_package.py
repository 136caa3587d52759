"""The layout of the package: which part may import which, and what the package shows to its users."""

import ast
import subprocess
import sys
from pathlib import Path

import lata_lightning

PACKAGE = Path(lata_lightning.__file__).parent
# From top to bottom; imports may only point down, those for type checkers alone included.
PARTS = [
    "cli", "quickstart", "training", "report", "callbacks", "evaluation", "exports", "display", "live", "merging", "linearity", "vectors", "rows", "store",
    "numerics", "weighting", "alignment", "moments", "layers", "errors",
]  # fmt: skip
MODULES_BESIDE_THE_PACKAGES = 6
OUTSIDE = {"recipes", "examples", "benchmarks", "study", "tests"}


def imports(file):
    """Modules that a file imports, annotations included."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from filter(is_module, (f"{node.module}.{alias.name}" for alias in node.names))


def is_module(name):
    """Whether a dotted name is a module of the package, or a package in it."""
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def part_of(file):
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def files():
    return [file for file in PACKAGE.rglob("*.py") if file.parent != PACKAGE or file.name not in ("__init__.py", "__main__.py")]


def module_name(file):
    parts = ("lata_lightning", *file.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def own_imports(file):
    return {module for module in imports(file) if module.startswith("lata_lightning.")}


def test_every_part_is_listed():
    assert {part_of(file) for file in files()} == set(PARTS)


def test_imports_of_a_module_from_its_package_are_seen(tmp_path):
    file = tmp_path / "importing.py"
    file.write_text("from lata_lightning import layers, merge\nfrom lata_lightning.store import hashing, formats\n")
    assert own_imports(file) == {
        "lata_lightning.layers",
        "lata_lightning.store",
        "lata_lightning.store.hashing",
        "lata_lightning.store.formats",
    }


def test_few_modules_are_beside_the_packages():
    assert len([file for file in files() if file.parent == PACKAGE]) <= MODULES_BESIDE_THE_PACKAGES


def test_imports_point_down_only():
    upward = [
        (str(file.relative_to(PACKAGE)), module)
        for file in files()
        for module in own_imports(file)
        if PARTS.index(module.split(".")[1]) < PARTS.index(part_of(file))
    ]
    assert upward == []


def test_no_modules_import_each_other_in_a_circle():
    graph = {module_name(file): own_imports(file) for file in files()}
    while True:
        leaves = {module for module, needed in graph.items() if not needed & graph.keys()}
        if not leaves:
            break
        graph = {module: needed for module, needed in graph.items() if module not in leaves}
    assert sorted(graph) == []


def test_nothing_below_the_callbacks_imports_lightning():
    below = PARTS[PARTS.index("callbacks") + 1 :]
    importing = [
        str(file) for file in files() if part_of(file) in below and any(module.split(".")[0] == "lightning" for module in imports(file))
    ]
    assert importing == []


def test_the_package_imports_nothing_from_outside_it():
    assert [(str(file), module) for file in files() for module in imports(file) if module.split(".")[0] in OUTSIDE] == []


def test_every_exported_name_is_there():
    assert all(getattr(lata_lightning, name) is not None for name in lata_lightning.__all__)
    assert set(lata_lightning.__all__) == set(lata_lightning._HOMES)


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(lata_lightning, "LATA")


def test_importing_the_package_imports_no_framework():
    code = "import sys, lata_lightning; print([name for name in ('torch', 'lightning', 'transformers') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
