"""Paths that hold something else than a command needs: every command says so in one line, in its own words."""

import re

import pytest

from lata_lightning.cli.main import COMMANDS, main, parser_of

pytestmark = pytest.mark.filterwarnings("ignore")
INNER = re.compile(
    r"Traceback|typing\.|<class|Namespace|jsonargparse|argparse|Parser key|NoneType|Union|Subtypes|\bNone\b|Errno|object at 0x|\.py\b"
)
# What a command reads, with an input of the right kind for everything but the one that is wrong.
RIGHT = {"start_model": "start", "tuned_model": "start", "onto": "start", "target": "start", "models": "start", "instruction": "vector"}
READ = (
    "start_model",
    "tuned_model",
    "onto",
    "target",
    "models",
    "vectors",
    "vector",
    "path",
    "paths",
    "instruction",
    "coefficients",
    "data",
)
WRONG = (
    "absent",
    "a/b/c/absent.safetensors",
    "empty",
    "text.txt",
    "empty.json",
    "list.json",
    "broken.safetensors",
    "cut.safetensors",
    "odd.jsonl",
)
ELSEWHERE = ("quickstart", "recipes", "completion")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, short_quickstart):
    """Inputs of the right kind, and of every wrong one."""
    path = tmp_path_factory.mktemp("inputs")
    (path / "start").symlink_to(short_quickstart / "models/instruct")
    (path / "vector").symlink_to(short_quickstart / "vectors/instruction")
    (path / "task").symlink_to(short_quickstart / "runs/math/task_vector")
    (path / "rows.jsonl").symlink_to(short_quickstart / "data/math.jsonl")
    (path / "empty").mkdir()
    (path / "text.txt").write_text("to whom it may concern\n")
    (path / "empty.json").write_text("{}")
    (path / "list.json").write_text("[1, 2]")
    (path / "broken.safetensors").write_bytes(b"\xff" * 64)
    (path / "cut.safetensors").write_bytes((16).to_bytes(8, "little") + b'{"a":')
    (path / "odd.jsonl").write_text('{"neither": "nor"}\nno json\n')
    return path


def given(parser, wrong_key, wrong):
    """The words of a command line with one wrong input, and whatever else must be given."""
    positional, options = [], []
    for action in parser._actions:
        key = action.dest
        needed = key in parser.required or key == wrong_key
        if not needed or key in ("help", "config", "print_config"):
            continue
        right = "task" if key in ("vectors", "vector", "path", "paths") else RIGHT.get(key, "rows.jsonl")
        value = wrong if key == wrong_key else "out" if key == "output" else "pure" if key == "to" else right
        if action.option_strings:
            options += [action.option_strings[-1], value]
        else:
            positional.append(value)
    return [*positional, *options]


def lines():
    for name, command in COMMANDS.items():
        if command.parses_itself or name in ELSEWHERE:
            continue
        parser = parser_of(name)
        for action in parser._actions:
            if action.dest in READ:
                yield from ([name, *given(parser, action.dest, wrong)] for wrong in WRONG)


def test_no_wrong_input_shows_a_traceback_or_an_inner_word(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    before = sorted(path.name for path in folder.iterdir())
    tried, odd = 0, []
    for words in lines():
        tried += 1
        try:
            status = main(words)
        except SystemExit as stopped:
            status = stopped.code
        printed, said = capsys.readouterr()
        last = said.strip().splitlines()[-1:] or [""]
        if status not in (1, 2) or printed or not last[0].startswith("lata") or INNER.search(last[0].replace(str(folder), "")):
            odd.append((" ".join(words), status, last[0] or printed[:200]))
    assert odd == []
    assert tried >= 100
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize(
    "words",
    [
        ["--trainer.max_epochs", "many"], ["--trainer.max_epoch", "1"], ["--lata.level", "blok"], ["--trainer.devices", "-7"],
        ["--lata.frobnicate", "1"], ["--model.model", "absent"], ["--data.data", "absent.jsonl"], ["--data.data", "odd.jsonl"],
        ["--model.learning_rate", "fast"], ["--config", "absent"], ["--config", "text.txt"], ["--ckpt_path", "absent.ckpt"], ["--frobnicate"],
        ["--lata.instruction_vector", "empty"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_no_wrong_fit_shows_a_traceback_or_an_inner_word(folder, monkeypatch, capsys, words):
    monkeypatch.chdir(folder)
    try:
        status = main(["fit", "--config", "track_full", "--output", "run", *words])
    except SystemExit as stopped:
        status = stopped.code
    said = capsys.readouterr().err
    last = said.strip().splitlines()[-1]
    assert status in (1, 2), said
    assert last.startswith("lata")
    assert not INNER.search(last.replace(str(folder), "")), last
    assert not (folder / "run").exists()
