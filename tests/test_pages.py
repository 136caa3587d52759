"""Every page is right: its code runs as it stands there, its links lead somewhere, and what it says about files is what the code writes."""

import ast
import json
import re
import runpy
import shlex
import shutil
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from pages import PAGES, ROOT, RUN, SHOWN, blocks, prose, read, run_all
from transformers import AutoModelForCausalLM

import lata_lightning
from lata_lightning import TaskVector, Term, merge
from lata_lightning.alignment import Alignment, LayerStats
from lata_lightning.cli.main import parser_of
from lata_lightning.exports.coefficients import export_coefficients
from lata_lightning.layers import LayerMap, LayerPosition
from lata_lightning.linearity.solution import Solution
from lata_lightning.live.history import MeasuredStep, append_history, summary
from lata_lightning.moments import Moments
from lata_lightning.store.meaning import Meaning
from lata_lightning.store.seal import sealed
from lata_lightning.store.tokens import TokenizerIdentity
from lata_lightning.vectors.artefact import verify
from lata_lightning.vectors.entries import FactorEntry, PrecisionLoss, TensorEntry
from lata_lightning.vectors.manifest import Manifest, library_versions
from lata_lightning.vectors.provenance import Derivation, Identity, Input, LayerValues

pytestmark = pytest.mark.filterwarnings("ignore")

# The tour begins as the README does, and goes on with what its first script leaves behind.
SHARED_FOLDER = {"docs/index.md": "README.md"}


@pytest.fixture(scope="session")
def ran(tmp_path_factory, short_quickstart):
    """Function from a page to the folder its blocks were run in, beside the output of a quickstart, and what they printed; each runs once."""
    folders, printed = {}, {}

    def of(page):
        key = SHARED_FOLDER.get(page, page)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("page"), {}
            (folders[key][0] / "quickstart-output").symlink_to(short_quickstart)
        if page not in printed:
            printed[page] = run_all(page, *folders[key])
        return folders[key][0], printed[page]

    return of


def runs(page):
    return any(block.language in RUN and block.not_run is None for block in blocks(page))


@pytest.mark.parametrize("page", [page for page in PAGES if runs(page)])
def test_the_blocks_of_a_page_run(page, ran):
    _, printed = ran(page)
    assert printed


@pytest.mark.parametrize("page", PAGES)
def test_a_block_is_run_or_says_why_not_or_is_no_code(page):
    assert [block.text for block in blocks(page) if block.language not in (*RUN, *SHOWN) and block.not_run is None] == []


def slug(title):
    """The address of a heading within its page."""
    text = re.sub(r"\[([^]]*)]\([^)]*\)", r"\1", title).replace("`", "").strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_something_that_exists(page):
    broken = []
    for target in re.findall(r"\[[^]]*]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        found = (ROOT / page).parent / path if path else ROOT / page
        titles = re.findall(r"^#+ (.+)$", prose(found.resolve().relative_to(ROOT)), re.MULTILINE) if anchor and found.is_file() else []
        if not found.exists() or (anchor and anchor not in map(slug, titles)):
            broken.append(target)
    assert broken == []


def test_every_page_of_results_is_on_the_page_of_benchmarks_or_of_evidence():
    included, compared = (
        re.findall(r"^```\{include\} \.\./(\S+)$", read(page), re.MULTILINE) for page in ("docs/benchmarks.md", "docs/evidence.md")
    )
    assert included == sorted(included)
    assert sorted([*included, *compared]) == sorted(
        str(page.relative_to(ROOT)) for folder in ("benchmarks", "study") for page in (ROOT / folder / "results").glob("*.md")
    )


def test_every_public_name_has_its_place_in_the_reference():
    pages = "".join(read(page) for page in PAGES if page.startswith("docs/api/"))
    documented = set(re.findall(r"^\.\. auto(?:class|function|exception):: (\w+)$", pages, re.MULTILINE)) | {"LataError"}
    assert documented == set(lata_lightning.__all__)
    package = Path(lata_lightning.__file__).parent
    modules = {f"lata_lightning.evaluation.{file.stem}" for file in (package / "evaluation").glob("[!_]*.py")}
    assert modules <= set(re.findall(r"^\.\. automodule:: (\S+)$", pages, re.MULTILINE))


# What particular pages promise.


def test_the_first_python_block_prints_an_alignment_table(ran):
    first = next(block for block in blocks("README.md") if block.language == "python")
    folder, printed = ran("README.md")
    assert "alignment at step 200" in printed[0]
    assert "(blocks of model.layers)" in printed[0]
    assert re.search(r"^ 7 +0\.", printed[0], re.MULTILINE)
    assert "class MyModule(pl.LightningModule)" in first.text
    assert len(first.text.strip().splitlines()) <= 30
    assert first in blocks("docs/index.md")
    assert (folder / "my-run/history.jsonl").is_file()


def test_the_commands_of_the_first_page_leave_models(ran):
    folder, printed = ran("README.md")
    assert "tensors match their recorded hashes" in printed[-1]
    for name in ("merged-in-python", "merged", "forgotten"):
        AutoModelForCausalLM.from_pretrained(folder / name)


def test_the_commands_of_the_tour_leave_models(ran):
    folder, printed = ran("docs/index.md")
    assert "tensors match their recorded hashes" in printed[-1]
    for name in ("sums-and-string", "sums-forgotten", "sums-as-a-model"):
        AutoModelForCausalLM.from_pretrained(folder / name)


def test_the_guide_has_six_situations():
    scripts = [block.script for block in blocks("docs/guide.md") if block.script]
    assert scripts == ["plain.py", "resume.py", "ddp.py", "fsdp.py", "cli.py", "conflict.py"]


@pytest.mark.parametrize(("output", "steps"), [("plain", [5, 10]), ("resumed", [5, 10]), ("ddp", [4]), ("fsdp", [4])])
def test_a_script_of_the_guide_leaves_its_history_and_a_weighted_vector(output, steps, ran):
    folder, printed = ran("docs/guide.md")
    assert TaskVector.open(folder / output / "task_vector").manifest.coefficients is not None
    assert [json.loads(line)["step"] for line in (folder / output / "history.jsonl").read_text().splitlines()] == steps
    assert all(printed[1:5])


def test_the_command_line_of_the_guide_has_a_section_for_the_callback(ran):
    folder, _ = ran("docs/guide.md")
    assert TaskVector.open(folder / "cli/task_vector").manifest.level == "submodule"


def test_the_card_of_lata_leaves_models(ran):
    folder, printed = ran("docs/lata.md")
    assert "model.layers" in printed[0]
    assert re.search(r"^ *7 ", printed[0], re.MULTILINE)
    assert "'model.layers.7': " in printed[1]
    for name in ("merged", "forgotten", "merged-in-python"):
        AutoModelForCausalLM.from_pretrained(folder / name)


def test_attention_only_vectors_are_trained_and_compared(ran):
    pytest.importorskip("matplotlib")
    folder, (_, projections, head, compared) = ran("docs/attention_only.md")
    moved = [name for name, tensor in TaskVector.open(folder / "reverse/task_vector").items() if tensor.any()]
    assert len(moved) == 8 * 4
    assert all("self_attn" in name for name in moved)
    assert projections.count("layers.0.self_attn") == 4
    assert head.splitlines()[-1] == "False"
    assert "'attention': " in compared
    assert "'mlp'" not in compared
    assert (folder / "disentanglement.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_of_regimes_is_that_of_the_benchmark():
    made = (ROOT / "benchmarks/results/regimes.md").read_text("utf-8").split("\n\n", 1)[1]
    assert made.strip() in read("docs/attention_only.md")


def test_the_card_of_linearity_measures_solves_and_merges(ran):
    folder, printed = ran("docs/linearity.md")
    assert "layers of model.layers" in printed[0]
    assert re.search(r"^ *7\.mlp ", printed[0], re.MULTILINE)
    assert "model.layers.0.attention" in printed[2]
    assert "one vector of 2" in printed[3]
    for name in ("merged-in-closed-form", "merged-from-python", "merged-by-regression"):
        AutoModelForCausalLM.from_pretrained(folder / name)
    record = json.loads((folder / "merged-in-closed-form/merge.json").read_text())
    solution = Solution.open(folder / "coefficients.json")
    assert [term["coefficients"] for term in record["terms"]] == [dict(solved.coefficients) for solved in solution.vectors]


def test_the_card_of_regression_makes_vectors_and_merges_them(ran):
    folder, printed = ran("docs/regression.md")
    assert "one vector of 2" in printed[0]
    assert "plain means: ()" in printed[-1]
    for name in ("merged-by-regression", "merged-from-python"):
        AutoModelForCausalLM.from_pretrained(folder / name)
    made = TaskVector.open(folder / "math-and-string").manifest.derivation
    assert [entry.facts["data"] for entry in made.inputs] == [f"quickstart-output/data/{name}.jsonl" for name in ("math", "string")]


def test_the_card_of_projection_makes_vectors_and_forgets_by_them(ran):
    folder, printed = ran("docs/projection.md")
    assert "times instruction was taken off a layer" in printed[0]
    for name in ("forgotten-across", "forgotten-from-python"):
        AutoModelForCausalLM.from_pretrained(folder / name)
    assert TaskVector.open(folder / "unwanted-across").manifest.derivation.settings == {"level": "tensor"}


def test_the_card_of_linearity_names_every_field_of_the_file(ran):
    folder, _ = ran("docs/linearity.md")
    document = Solution.open(folder / "coefficients.json").to_json()
    named = set(re.findall(r"`(\w+)`", read("docs/linearity.md").split("## The file")[1].split("## Source")[0]))
    assert set(document) <= named
    assert set(document["vectors"][0]) <= named
    assert set(document["layers"]["model.layers.0"]) <= named


# The format.


def about(numbers):
    """The same document with numbers that may differ in the last digits, as square roots do between machines."""
    if isinstance(numbers, dict):
        return {key: about(value) for key, value in numbers.items()}
    if isinstance(numbers, list):
        return [about(value) for value in numbers]
    return pytest.approx(numbers, rel=1e-12) if isinstance(numbers, float) else numbers


def test_the_example_of_the_format_is_what_is_written(ran):
    folder, _ = ran("docs/format.md")
    (shown,) = (json.loads(block.text) for block in blocks("docs/format.md") if block.language == "json")
    written = json.loads((folder / "example/task_vector.json").read_text("utf-8"))
    # The hash of the file covers the versions.
    assert shown.pop("self_hash")[:7] == written.pop("self_hash")[:7] == "blake3:"
    assert set(shown.pop("versions")) == set(written.pop("versions")) == set(library_versions())
    assert written == about(shown)
    # Keys in the order in which they stand in the file, too.
    assert list(written) == list(shown)
    assert verify(folder / "example") == 5


def test_the_reader_of_the_format_finds_what_was_saved(ran, tmp_path, monkeypatch):
    folder, _ = ran("docs/format.md")
    reader = runpy.run_path(str(folder / "read_vector.py"))
    vector = TaskVector.open(folder / "example")
    vector.save(tmp_path / "sharded", max_shard_bytes=24)
    assert (tmp_path / "sharded/delta.safetensors.index.json").is_file()
    for directory in (folder / "example", tmp_path / "sharded"):
        differences, coefficients = reader["read"](directory)
        assert list(differences) == list(vector)
        assert all(np.array_equal(differences[name], vector[name].numpy()) for name in vector)
        assert coefficients == {name: vector.coefficient_of(name) for name in vector}
    monkeypatch.setattr(sys, "argv", ["example.py"])
    monkeypatch.chdir(tmp_path)
    weights = {name: tensor.numpy() for name, tensor in runpy.run_path(str(folder / "example.py"))["instruct"].state_dict().items()}
    assert reader["content_hash"](weights) == vector.manifest.start_identity.content_hash


def test_keys_that_a_reader_does_not_know_are_ignored_where_the_format_says_so(ran, tmp_path):
    folder, _ = ran("docs/format.md")
    shutil.copytree(folder / "example", tmp_path / "later")
    path = tmp_path / "later/task_vector.json"
    document = json.loads(path.read_text("utf-8"))
    document["remark"] = document["tensors"]["embedding.weight"]["remark"] = "of a later release"
    path.write_text(json.dumps(document))
    assert TaskVector.open(path.parent).manifest == TaskVector.open(folder / "example").manifest


def named_keys(section):
    """What stands in backticks in a section of the page about the format."""
    return set(re.findall(r"`([^`]+)`", re.split(rf"^#+ {section}$", prose("docs/format.md"), flags=re.MULTILINE)[1]))


def keys(document, names=()):
    """All keys of a document, but those that are names of tensors and layers: the keys of objects that stand under one of these names."""
    found = set()
    if isinstance(document, list):
        return found.union(*(keys(value, names) for value in document))
    for key, value in document.items() if isinstance(document, dict) else ():
        found |= {key} | (keys(list(value.values()), names) if key in names and isinstance(value, dict) else keys(value, names))
    return found


@pytest.fixture
def manifest():
    """A manifest in which no field is empty."""
    stats = LayerStats(0.5, 0.25, 1.0, 4.0, 1.0)
    vocabulary = {"tokens": 1, "hash": "blake3:04", "files": "blake3:05", "first_hash": "blake3:06", "last": {"0": "<s>"}}
    found = Manifest(
        kind="task",
        start="instruct",
        layers=LayerMap({"w": LayerPosition("b", "mlp"), "e": LayerPosition(None, "embedding")}, ("b",)),
        start_identity=Identity("start", "main", "blake3:00"),
        tuned_identity=Identity("tuned", "main", "blake3:01"),
        weighting="threshold",
        threshold=0.9,
        coefficients={"b": 1.0},
        alignment=Alignment("block", "instruct", {"b": stats}, {"e": stats}),
        instruction_identity=(Identity("base"), Identity("start")),
        meaning=Meaning({"rope_theta": 1.0}, (TokenizerIdentity.from_json(vocabulary),)),
        tied=(("e", "h"),),
        leave_out=("head",),
        step=1,
        epoch=1,
        precision_loss=PrecisionLoss(0.0, 1.0),
        derivation=Derivation(
            "regression",
            {"ridge": 1.0},
            (Input("one", Identity("tuned"), {"samples": 30}),),
            ("w",),
            (LayerValues("interference", {"b": 0.5}, "one"),),
        ),
        tensors={
            "w": TensorEntry((2, 2), "float32", None, False, (FactorEntry(1, 2.0, "blake3:02", "blake3:03"),)),
            "e": TensorEntry((2,), "float32"),
        },
        asked_for=False,
    )
    empty = Manifest(kind="task", start="instruct", layers=found.layers)
    assert [field.name for field in fields(found) if getattr(found, field.name) == getattr(empty, field.name)] == [
        "kind", "start", "layers", "level", "outside"
    ]  # fmt: skip
    return found


NAMES = ("config", "last", "coefficients", "layers", "outside", "settings", "facts", "tensors", "versions")


def test_the_format_names_every_key_of_the_manifest(manifest):
    written = json.loads(sealed(manifest.to_json()))
    named = named_keys("`task_vector.json`") | named_keys("The tensors")
    assert keys(written, NAMES) - set(library_versions()) <= named
    # Nothing is listed that is not written.
    tables = prose("docs/format.md").split("## `task_vector.json`")[1].split("## Hashes")[0]
    listed = {key for row in re.findall(r"^\| (`.+?) \|", tables, re.MULTILINE) for key in re.findall(r"`(\w+)`", row)}
    assert listed <= keys(written, NAMES)


def test_the_format_names_every_key_of_a_merge_record(short_quickstart, tmp_path):
    models = short_quickstart / "models"
    vector = TaskVector.between(models / "instruct", models / "math")
    written = json.loads((merge(models / "instruct", [Term(vector)], tmp_path / "merged", vocabulary="onto") / "merge.json").read_text())
    record = {**written, "vocabulary": {"rows_of": "onto", "before": 1, "after": 1, "notes": []}}
    named = named_keys("`merge.json`") | named_keys("`task_vector.json`")
    assert keys(record, NAMES) - set(library_versions()) <= named


def test_the_format_names_every_key_of_the_history(tmp_path, manifest):
    figures = summary(Moments(1.0, 1.0, 1.0), manifest.alignment, known_instruction=True)
    measured = MeasuredStep(5, 0, {**figures, "cosine/{name}": 0.5}, manifest.alignment, {"math": {"h.0": 0.5}})
    append_history(tmp_path / "history.jsonl", measured)
    written = json.loads((tmp_path / "history.jsonl").read_text())
    listed = named_keys("`history.jsonl`")
    assert set(written) <= listed
    alone = summary(Moments(0.0, 1.0, 0.0), manifest.alignment, known_instruction=False)
    assert set(alone) == {"task_norm"}


def test_the_format_names_every_key_of_exported_coefficients(ran, tmp_path):
    folder, _ = ran("docs/format.md")
    export_coefficients([TaskVector.open(folder / "example")], tmp_path / "table")
    written = json.loads((tmp_path / "table/coefficients.json").read_text())
    named = named_keys("`coefficients.json`")
    assert set(written) | set(written["vectors"][0]) <= named
    assert set((tmp_path / "table/coefficients.csv").read_text().splitlines()[0].split(",")) <= named


# The pages for those who come with another tool, or with an error.


@pytest.mark.parametrize("page", ["docs/coming_from.md", "docs/troubleshooting.md"])
def test_every_command_in_the_text_is_understood(page):
    # A command that is written out names models and vectors in capitals.
    commands = [shlex.split(code) for code in re.findall(r"`lata ([a-z]+ [^`]*[A-Z]{3}[^`]*)`", prose(page)) if "..." not in code]
    assert commands
    for name, *arguments in commands:
        if name == "fit":  # its options are those of Lightning's own command line
            continue
        parser = parser_of(name)
        assert parser.parse_args(parser.arranged(arguments))


def test_every_error_that_is_explained_is_one_the_package_raises():
    package = Path(lata_lightning.__file__).parent
    texts = [
        "".join(
            part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else "{}"
            for part in getattr(node, "values", [node])
        )
        for file in package.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.JoinedStr | ast.Constant)
    ]
    explained = re.findall(r'^### "(.+)"$', read("docs/troubleshooting.md"), re.MULTILINE)
    assert len(explained) >= 20
    assert [phrase for phrase in explained if not any(phrase in text for text in texts)] == []
