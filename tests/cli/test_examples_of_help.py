import shlex
from pathlib import Path

import pytest

from lata_lightning.cli.examples import EXAMPLES
from lata_lightning.cli.main import COMMANDS, main

pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).parent.parent.parent
# They take minutes; the quickstart and the recipes have tests of their own.
LONG = ("quickstart", "fit")


def test_every_command_has_two_examples():
    assert list(EXAMPLES) == list(COMMANDS)
    assert {len(lines) for lines in EXAMPLES.values()} == {2}


def test_the_examples_of_the_help_run_in_order_beside_the_output_of_a_quickstart(short_quickstart, tmp_path, monkeypatch, capsys):
    (tmp_path / "quickstart-output").symlink_to(short_quickstart)
    monkeypatch.chdir(tmp_path)
    for name in (name for name in EXAMPLES if name not in LONG):
        for line in EXAMPLES[name]:
            arguments = shlex.split(line.partition(" > ")[0])[1:]
            assert main(arguments) == 0, f"{line}: {capsys.readouterr().err}"
            assert capsys.readouterr().out, line


def test_the_recipes_that_the_examples_name_are_there():
    for line in EXAMPLES["fit"]:
        assert [word for word in shlex.split(line) if word.startswith("recipes/") and not (ROOT / word).is_file()] == []
