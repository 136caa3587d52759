import re
import shlex
import subprocess
import sys
from typing import Literal, get_args, get_origin

import pytest

from lata_lightning.cli.examples import EXAMPLES
from lata_lightning.cli.main import COMMANDS, build_parser, main, overview, parser_of
from lata_lightning.cli.reference import reference

PARSED = [name for name, command in COMMANDS.items() if not command.parses_itself]
INNER = re.compile(r"Traceback|typing\.|<class|Namespace|jsonargparse|argparse|Parser key|NoneType|Union|Subtypes|None\b|null")


@pytest.fixture
def usage(capsys):
    """Runs a line that is wrong usage; gives its one line on standard error."""

    def run(line):
        with pytest.raises(SystemExit) as stopped:
            main(line if isinstance(line, list) else shlex.split(line))
        printed, said = capsys.readouterr()
        assert (stopped.value.code, printed) == (2, "")
        assert said.count("\n") == 1, said
        assert not INNER.search(said), said
        return said

    return run


def parsed(line):
    name, *words = shlex.split(line)
    parser = parser_of(name)
    return parser.parse_args(parser.arranged(words))


@pytest.mark.parametrize(
    "line",
    [
        "merge --scale 0.5 0.25 ONTO a b --output o --weighting none",
        "merge --output o ONTO --scale 0.5 0.25 a --weighting=none b",
        "merge ONTO a b --weighting none --output=o --scale 0.5 0.25",
        "merge --weighting none --output o --scale 0.5 0.25 -- ONTO a b",
    ],
)
def test_options_may_stand_anywhere_on_the_line(line):
    options = parsed(line)
    assert (options.onto, options.vectors, options.scale) == ("ONTO", ["a", "b"], [0.5, 0.25])
    assert (options.output, options.weighting) == ("o", "none")


def test_negative_numbers_are_values_and_not_options():
    assert parsed("merge ONTO a b --output o --scale -0.5 -1e-3").scale == [-0.5, -0.001]
    assert parsed("forget TARGET v --output o --scale -2").scale == -2.0


def test_a_switch_without_a_value_is_switched_on():
    assert parsed("tune --forget ONTO v --data a.jsonl --control b.jsonl --output o").forget is True
    assert parsed("tune ONTO v --forget false --data a.jsonl --output o").forget is False


def test_an_option_may_be_shortened_as_long_as_it_is_the_only_one():
    assert parsed("merge ONTO v --outp o").output == "o"


def test_an_ambiguous_short_form_is_refused(usage):
    assert "there is no option --out" in usage("merge ONTO v --out o")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("mrege a b", "there is no command mrege; did you mean merge?"),
        ("zzz", "there is no command zzz. lata --help lists all commands."),
        ("--frobnicate", "there is no option --frobnicate."),
        ("merge", "lata merge: error: ONTO and VECTOR... and --output DIR must be given."),
        ("merge a b", "--output DIR must be given."),
        ("merge a b --output", "--output needs a value."),
        ("merge a b --output o --dtype", "--dtype needs a value: float32, bfloat16 or float16."),
        ("merge a b --output o --scale half", "--scale takes a number, got 'half'."),
        (
            "merge a b --output o --weighting lineer",
            "--weighting takes linear, log, threshold, none or stored, got 'lineer'; did you mean linear?",
        ),
        ("merge a b --output o --weigting linear", "there is no option --weigting; did you mean --weighting?"),
        ("merge a b --output o --workers 0", "--workers takes a whole number above 0, got '0'."),
        ("merge a b --output o --check-base=perhaps", "--check-base takes true or false, got 'perhaps'."),
        ("verify a b", "too many arguments: b."),
        ("merge a b --config nowhere.yaml --output o", "nowhere.yaml"),
    ],
)
def test_wrong_usage_is_one_line_that_says_what_is_wanted(usage, line, message):
    assert message in usage(line)


def test_an_entry_of_a_configuration_that_does_not_exist_is_named(usage, tmp_path):
    (tmp_path / "wrong.yaml").write_text("ouput: o\n")
    assert "has an entry 'ouput' that this command does not take; did you mean output?" in usage(
        f"merge a b --config {tmp_path}/wrong.yaml"
    )


def wrong_lines():
    """At least 200 wrong lines made from the parsers: each option misspelled, without a value, and with a value it cannot take."""
    for name in PARSED:
        parser = parser_of(name)
        required = [word for key in sorted(parser.required) for word in required_words(parser, key)]
        for action in parser._actions:
            if not action.option_strings or action.dest in ("help", "print_config", "config"):
                continue
            option, kind = action.option_strings[-1], parser.types[action.dest]
            yield [name, *required, f"{option}x", "1"]
            if kind is not bool:
                yield [name, *required, option]
            if kind not in (str, None):
                yield [name, *required, f"{option}=%wrong%"]
                yield [name, *required, f"{option}="]
        if required:
            yield [name]
        yield [f"{name}x"]


def required_words(parser, key):
    action = next(action for action in parser._actions if action.dest == key)
    kind = parser.types.get(key)
    value = get_args(kind)[0] if get_origin(kind) is Literal else "word"
    return [value] if not action.option_strings else [action.option_strings[-1], value]


def test_no_wrong_line_shows_a_traceback_or_an_inner_word(usage):
    lines = list(wrong_lines())
    assert len(lines) >= 200
    for line in lines:
        usage(line)


def test_without_a_command_the_overview_is_shown(capsys):
    assert main([]) == 0
    assert capsys.readouterr().out == overview()
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == overview()


def test_the_overview_lists_every_command():
    assert set(re.findall(r"^  (\w+) ", overview(), re.MULTILINE)) == set(COMMANDS)


def test_the_version_can_be_asked_for(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"lata \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize("name", PARSED)
def test_help_begins_with_one_line_of_usage_and_ends_with_two_examples(name):
    text = parser_of(name).format_help()
    assert text.startswith(f"usage: lata {name} ")
    assert text.split("\n")[1] == ""
    assert text.rstrip().endswith("\n".join(f"  {line}" for line in EXAMPLES[name]))
    assert len(EXAMPLES[name]) == 2
    assert not INNER.search(text)


def test_the_usage_names_what_must_be_given():
    assert parser_of("merge").format_usage() == "usage: lata merge ONTO VECTOR... --output DIR [options]\n"


def test_the_help_of_fit_is_short_and_needs_no_lightning():
    code = "import sys; from lata_lightning.cli.main import main; main(['fit', '--help']); print('lightning' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *text, imported = done.stdout.splitlines()
    assert len(text) < 40
    assert imported == "False False"


def test_every_option_in_an_example_exists():
    for name in PARSED:
        for line in EXAMPLES[name]:
            program, command, *words = shlex.split(line.partition(" > ")[0])
            assert (program, command) == ("lata", name)
            parser = parser_of(name)
            assert parser.parse_args(parser.arranged(words))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_commands_and_options(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in COMMANDS)
    assert "weighting" in script


def test_completion_is_made_from_the_parsers_there_are():
    assert set(build_parser()._subcommands_action.choices) == set(COMMANDS)


def test_the_page_of_all_commands_holds_every_help():
    page = reference()
    assert re.findall(r"^## lata (\w+)$", page, re.MULTILINE) == list(COMMANDS)
    for name in PARSED:
        assert parser_of(name).format_help().rstrip() in page
