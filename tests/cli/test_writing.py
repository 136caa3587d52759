"""Dry runs, replaced output and uploads: the same for every command that writes."""

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError

from lata_lightning.cli import main as entry
from lata_lightning.cli.examples import EXAMPLES
from lata_lightning.cli.hub import check_hub
from lata_lightning.cli.main import main, parser_of
from lata_lightning.cli.writing import size_in_words
from lata_lightning.vectors.task_vector import TaskVector

pytestmark = pytest.mark.filterwarnings("ignore")
MODELS = "quickstart-output/models"
VECTOR = "quickstart-output/runs/math/task_vector"
OTHER = "quickstart-output/runs/string/task_vector"
DATA = "quickstart-output/data/math.jsonl"
LINES = [
    f"extract {MODELS}/instruct {MODELS}/math --output out",
    f"project {VECTOR} --instruction quickstart-output/vectors/instruction --output out",
    f"merge {MODELS}/instruct {VECTOR} --weighting none --output out",
    f"merge {MODELS}/instruct {VECTOR} {OTHER} --method regression --output out",
    f"forget {MODELS}/math {VECTOR} --weighting none --output out",
    f"export {VECTOR} --to pure --weighting linear --output out",
    f"export {VECTOR} --to hf --weighting none --output out",
    f"export {VECTOR} --to peft --rank 2 --weighting none --output out",
    f"export {VECTOR} --to mergekit --weighting none --output out",
    f"export {VECTOR} --to coefficients --weighting linear --output out",
    f"regress {MODELS}/instruct {VECTOR} {OTHER} --output out",
    f"regress {MODELS}/instruct {VECTOR} --data {DATA} --samples 2 --output out",
    f"solve {MODELS}/instruct {VECTOR} --data {DATA} --samples 2 --output out",
    f"linearity {MODELS}/instruct {VECTOR} --data {DATA} --samples 2 --figure out.png",
    f"tune {MODELS}/instruct {VECTOR} --data {DATA} --grid 1 --figure false --output out",
    f"evaluate {MODELS}/instruct --data {DATA} --output out",
    "report quickstart-output/runs/math --output out",
    "recipes --copy out",
]
HUB = [line for line in LINES if "push_to_hub" in parser_of(line.split()[0]).types]


@pytest.fixture
def lata(short_quickstart, tmp_path, monkeypatch, capsys):
    """Runs a command beside the output of a quickstart; gives exit status, standard output and standard error."""
    (tmp_path / "quickstart-output").symlink_to(short_quickstart)
    monkeypatch.chdir(tmp_path)

    def run(line):
        status = main(shlex.split(line))
        return status, *capsys.readouterr()

    return run


def left(folder):
    return sorted(entry.name for entry in folder.iterdir() if entry.name != "quickstart-output")


def test_every_command_that_writes_can_be_tried_without_writing():
    without = [name for name in EXAMPLES if name not in ("fit", "align", "inspect", "verify", "completion")]
    assert [name for name in without if "dry_run" not in parser_of(name).types] == []


@pytest.mark.parametrize("line", LINES)
def test_a_dry_run_says_what_would_be_written_and_writes_nothing(lata, tmp_path, line):
    status, printed, said = lata(f"{line} --dry-run")
    assert (status, left(tmp_path)) == (0, []), said
    assert "writes   out" in printed
    assert printed.endswith("This was a dry run: nothing was written.\n")
    for word in shlex.split(line):
        if word.startswith("quickstart-output"):
            assert f"{word} (" in printed


def test_a_dry_run_lists_sizes_and_what_is_applied(lata, tmp_path):
    lata(f"extract {MODELS}/instruct {MODELS}/math --output vector")
    status, printed, said = lata(f"merge {MODELS}/instruct vector {MODELS}/string --scale 0.5 --output merged --dry-run")
    assert status == 0
    assert printed.splitlines()[:4] == [
        f"reads    {MODELS}/instruct (directory)",
        "         vector (vector)",
        f"         {MODELS}/string (directory)",
        "applies  scale 0.5: vector: coefficient 1 for every tensor",
    ]
    assert "coefficient" not in said
    shown = next(line for line in printed.splitlines() if line.startswith("writes"))
    lata(f"merge {MODELS}/instruct vector {MODELS}/string --scale 0.5 --output merged")
    written = sum(file.stat().st_size for file in (tmp_path / "merged").iterdir() if file.name not in ("merge.json", "README.md"))
    assert size_in_words(written).split()[1] in shown
    assert float(shown.split(", ")[1].split()[0]) == pytest.approx(float(size_in_words(written).split()[0]), rel=0.02)


def test_a_dry_run_as_json(lata, tmp_path):
    status, printed, _ = lata(f"regress {MODELS}/instruct {VECTOR} {OTHER} --output out --dry-run --format json")
    plan = json.loads(printed)
    assert (status, plan["dry_run"], plan["uploads_to"]) == (0, True, None)
    assert [entry["holds"] for entry in plan["reads"]] == ["directory", "vector", "vector"]
    assert plan["writes"]["path"] == "out"
    assert plan["writes"]["bytes"] > 0
    assert plan["writes"]["replaces"] is False


def test_a_dry_run_refuses_what_the_run_would(lata):
    status, printed, said = lata(f"merge {MODELS}/instruct {VECTOR} --scale 1 2 --output out --dry-run")
    assert (status, printed) == (1, "")
    assert "give one scale for all vectors or one for each" in said
    for line in ("recipes --dry-run", f"evaluate {MODELS}/instruct --data {DATA} --dry-run"):
        status, _, said = lata(line)
        assert (status, "nothing is: leave it out" in said) == (1, True)


@pytest.mark.parametrize("line", [line for line in LINES if "overwrite" in parser_of(line.split()[0]).types])
def test_output_is_replaced_on_request_only(lata, tmp_path, line):
    assert lata(line)[0] == 0
    status, _, said = lata(line)
    assert (status, "exists already" in said) == (1, True)
    before = left(tmp_path)
    assert "in the place of what is there" in lata(f"{line} --overwrite --dry-run")[1]
    status, _, said = lata(f"{line} --overwrite")
    assert (status, left(tmp_path)) == (0, before), said


def test_an_input_is_not_overwritten(lata, tmp_path):
    lata(f"extract {MODELS}/instruct {MODELS}/math --output vector")
    status, _, said = lata("project vector --instruction quickstart-output/vectors/instruction --output vector --overwrite")
    assert (status, "vector cannot be overwritten, as vector is read from it" in said) == (1, True)
    assert len(TaskVector.open(tmp_path / "vector"))


class Hub:
    """What the hub's client is asked for, without a network."""

    calls: list = []
    fails = ()

    def whoami(self):
        self._call("whoami")

    def create_repo(self, repo_id, **settings):
        self._call("create_repo", repo_id, settings)
        return SimpleNamespace(repo_id=f"me/{repo_id.removeprefix('me/')}")

    def upload_folder(self, *, repo_id, folder_path, **_):
        self._call("upload_folder", repo_id, sorted(file.name for file in Path(folder_path).iterdir()))

    def _call(self, name, *arguments):
        if name in self.fails:
            raise OSError(f"{name} failed")
        self.calls.append((name, *arguments))


@pytest.fixture
def hub(monkeypatch):
    """The stub in the place of the hub, with a token and a network."""
    monkeypatch.setattr(Hub, "calls", [])
    monkeypatch.setattr(Hub, "fails", ())
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
    return Hub


@pytest.mark.parametrize("line", [HUB[0], HUB[2]])
def test_a_finished_directory_is_uploaded(lata, hub, tmp_path, line):
    status, _, said = lata(f"{line} --push-to-hub mine")
    assert (status, said.splitlines()[-1]) == (0, "lata: uploaded to https://huggingface.co/me/mine")
    assert hub.calls == [
        ("whoami",),
        ("create_repo", "mine", {"private": True, "exist_ok": True}),
        ("upload_folder", "me/mine", sorted(file.name for file in (tmp_path / "out").iterdir())),
    ]


def test_a_dry_run_uploads_nothing(lata, hub):
    _, printed, _ = lata(f"{HUB[0]} --push-to-hub mine --dry-run")
    assert "uploads  out to mine\n" in printed
    assert hub.calls == [("whoami",)]


def test_an_upload_that_cannot_succeed_is_refused_before_work_begins(lata, hub, tmp_path, monkeypatch):
    def refused(reason, repository="mine"):
        status, printed, said = lata(f"{HUB[0]} --push-to-hub {repository}")
        assert (status, printed, said.count("\n"), left(tmp_path)) == (1, "", 1, [])
        assert reason in said

    refused("takes the name of a repository, such as 'name/model', got 'a/b/c'", "a/b/c")
    monkeypatch.setattr(Hub, "fails", ("whoami",))
    refused("the hub cannot be reached, or does not accept the token (whoami failed)")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    refused("needs a token of the hub with the right to write: run 'hf auth login'")
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True)
    refused("HF_HUB_OFFLINE is set")


def test_an_upload_that_fails_leaves_the_directory_and_says_how_to_go_on(lata, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(Hub, "fails", ("upload_folder",))
    status, _, said = lata(f"{HUB[0]} --push-to-hub me/mine")
    assert (status, left(tmp_path)) == (1, ["out"])
    assert "out was written, but not uploaded to me/mine (upload_folder failed). Try again with: hf upload me/mine out" in said


def test_what_a_hub_would_not_take_is_not_pushed(lata, hub):
    status, _, said = lata(f"export {VECTOR} --to coefficients --weighting linear --output out --push-to-hub mine")
    assert (status, "--to coefficients writes none of them" in said) == (1, True)


def test_an_answer_of_the_hub_is_one_line(hub, monkeypatch):
    def denied(self):
        raise HfHubHTTPError("401 Unauthorized\nmore", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(Hub, "whoami", denied)
    with pytest.raises(entry.LataError, match=r"does not accept the token \(401 Unauthorized\)"):
        check_hub("mine")


def test_sizes_are_written_as_people_write_them():
    assert [size_in_words(size) for size in (12, 3_400, 12_345_678, 7_000_000_000)] == ["12 bytes", "3.4 kB", "12.3 MB", "7 GB"]
