import json
from pathlib import Path

import pytest
from jsonargparse import Namespace

from lata_lightning.cli.main import main
from lata_lightning.cli.shipped import RECIPES, as_typed, located, recipe, recipes
from lata_lightning.errors import LataError
from lata_lightning.quickstart.experts import BASE, INSTRUCT


def test_shipped_checkpoints_and_data_have_names_that_work_anywhere():
    assert located("quickstart:instruct") == str(INSTRUCT)
    assert located(["quickstart:base", "x"]) == [str(BASE), "x"]
    assert located(Namespace(a={"b": ("recipes:math.jsonl", 1)}, c=None)) == Namespace(
        a={"b": (str(RECIPES / "data" / "math.jsonl"), 1)}, c=None
    )


@pytest.mark.parametrize("text", ["C:\\models", "org/name", "quickstart", "s3://x", "other:instruct", ""])
def test_any_other_text_stays_as_it_is(text):
    assert located(text) == text


@pytest.mark.parametrize("text", ["quickstart:instrct", "recipes:maths.jsonl"])
def test_an_unknown_shipped_name_is_refused_with_the_nearest_and_all_choices(text):
    with pytest.raises(LataError, match=r"ships no .*did you mean .*There are "):
        located(text)


@pytest.mark.parametrize("text", ["quickstart:../text", "quickstart:/etc/passwd", "recipes:.", "recipes:"])
def test_a_shipped_name_never_becomes_a_path(text):
    with pytest.raises(LataError, match="the package ships no"):
        located(text)


def test_a_recipe_is_taken_by_its_name_and_a_file_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipe("track_lora") == recipe("track_lora.yaml") == str(RECIPES / "track_lora.yaml")
    Path("track_lora").write_text("")
    assert recipe("track_lora") == "track_lora"
    assert recipe("elsewhere/mine.yaml") == "elsewhere/mine.yaml"


def test_an_unknown_recipe_is_refused_with_the_nearest(capsys):
    assert main(["fit", "--config", "track_lroa"]) == 1
    assert "no recipe of that name; did you mean track_lora?" in capsys.readouterr().err


def test_the_recipes_are_listed_with_what_they_do(capsys):
    assert main(["recipes", "--format", "json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert list(listed) == list(recipes())
    assert all(text and not text.startswith("#") for text in listed.values())
    assert main(["recipes"]) == 0
    assert "track_lora" in capsys.readouterr().out


def test_the_recipes_can_be_copied_and_nothing_is_overwritten(tmp_path, capsys):
    assert main(["recipes", "--copy", str(tmp_path / "mine")]) == 0
    assert (tmp_path / "mine" / "track_lora.yaml").read_bytes() == (RECIPES / "track_lora.yaml").read_bytes()
    assert (tmp_path / "mine" / "data" / "math.jsonl").is_file()
    capsys.readouterr()
    assert main(["recipes", "--copy", str(tmp_path / "mine")]) == 1
    assert "is not empty" in capsys.readouterr().err


def test_commands_take_shipped_checkpoints(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["extract", "quickstart:base", "quickstart:instruct", "--kind", "instruction", "--output", "instruction"]) == 0
    assert main(["inspect", "quickstart:instruct"]) == 0


def test_a_shipped_path_is_shown_as_it_is_typed(tmp_path):
    for name in ("quickstart:instruct", "recipes:math.jsonl"):
        assert as_typed(located(name)) == name
    assert as_typed(str(tmp_path / "instruct")) == str(tmp_path / "instruct")
