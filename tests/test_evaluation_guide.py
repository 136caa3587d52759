import re
import shlex
from pathlib import Path

import pytest

from lata_lightning.cli.main import COMMANDS, parser_of
from lata_lightning.cli.shipped import recipes
from lata_lightning.evaluation.continual import summary
from lata_lightning.training.continual import learn_in_sequence

GUIDE = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text("utf-8")
LINES = [line for block in re.findall(r"^```bash\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL) for line in block.splitlines()]


@pytest.mark.parametrize("line", LINES)
def test_every_command_of_the_guide_is_understood(line):
    words = shlex.split(line)
    assert words[0] == "lata"
    if COMMANDS[words[1]].parses_itself:
        # The parser of `fit` loads the classes that a recipe names; the tests of the recipes run it.
        assert words[2:4] == ["--config", "classify"]
        assert "classify" in recipes()
        return
    parser = parser_of(words[1])
    assert parser.parse_args(parser.arranged(words[2:]))


def test_the_guide_names_what_there_is():
    assert len(LINES) == 13
    assert f"{learn_in_sequence.__module__}.{learn_in_sequence.__name__}" in GUIDE
    assert summary.__module__ in GUIDE
    for name in ("average accuracy", "backward transfer", "forward transfer", "forgetting"):
        assert name in GUIDE
        assert name.replace(" ", "_") in summary([[1.0]])
