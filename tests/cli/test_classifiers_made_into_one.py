"""Vectors of classifiers with heads of different sizes, made into one or solved for: of encoders, and of a decoder that is stored without its prefix."""

import json

import numpy as np
import pytest
import torch
from classifier_runs import FILTERS, STARTS, TASKS, accuracy, inputs_of
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from lata_lightning import TaskVector
from lata_lightning.cli.main import main

pytestmark = FILTERS
ROWS = 9


@pytest.fixture
def lata(classifiers, monkeypatch, capsys):
    monkeypatch.chdir(classifiers)

    def run(*words):
        capsys.readouterr()
        try:
            status = main(list(words))
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


def vectors_of(start):
    return [f"{start}-{task}/lata/task_vector" for task in TASKS]


def without_prefix(tensors):
    """Tensors under the names that the body of a model has for them."""
    prefixes = ("bert.", "transformer.")
    return {next((name[len(prefix) :] for prefix in prefixes if name.startswith(prefix)), name): tensor for name, tensor in tensors.items()}


def deltas_of(path):
    return without_prefix(load_file(f"{path}/delta.safetensors"))


def bodies(start):
    """The start and both tuned bodies as modules of transformers, from the files alone."""
    found = []
    for vector in (None, *vectors_of(start)):
        body = AutoModel.from_pretrained(start).eval()
        deltas = {} if vector is None else deltas_of(vector)
        with torch.no_grad():
            for name, tensor in body.state_dict().items():
                tensor.add_(deltas.get(name, 0.0))
        found.append(body)
    return found


def blocks_of(body):
    return body.h if body.config.model_type == "gpt2" else body.encoder.layer


def first_of(output):
    return output[0] if isinstance(output, tuple) else output


def block_inputs(body, texts, index):
    """What a block takes in, text by text."""
    seen = []
    handle = blocks_of(body)[index].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        for text in texts:
            body(**text)
    handle.remove()
    return seen


def texts_of(start):
    return [inputs_of(AutoTokenizer.from_pretrained(start), task, ROWS) for task in TASKS]


def check_scores(lata, start, merged):
    """The merged model scored with the head of each task: what transformers gives for it."""
    words = ("--data", *(f"{task}.jsonl" for task in TASKS), "--head", *(f"{start}-{task}/lata" for task in TASKS))
    status, printed, said = lata("evaluate", str(merged), *words, "--format", "json")
    assert status == 0, said
    expected = {task: accuracy(str(merged), f"{start}-{task}", task) for task in TASKS}
    assert {task: row["accuracy"] for task, row in json.loads(printed).items()} == pytest.approx(expected)
    assert all(number > 1 / len(TASKS[task]) for task, number in expected.items())


@pytest.mark.parametrize("start", STARTS)
def test_solved_coefficients_are_the_least_squares_optimum_of_the_models_that_transformers_runs(lata, tmp_path, start):
    data, samples = [f"{task}.jsonl" for task in TASKS], ("--samples", str(ROWS))
    status, _, said = lata("solve", start, *vectors_of(start), "--data", *data, *samples, "--output", str(tmp_path / "solved.json"))
    assert status == 0, said
    solved = json.loads((tmp_path / "solved.json").read_text())
    own, *tuned = bodies(start)
    for index in range(2):
        columns = []
        for texts in texts_of(start):
            hidden = block_inputs(own, texts, index)
            with torch.no_grad():
                before = torch.cat([first_of(blocks_of(own)[index](states)).flatten(0, 1) for states in hidden])
                after = [torch.cat([first_of(blocks_of(body)[index](states)).flatten(0, 1) for states in hidden]) for body in tuned]
            columns.append([((moved - before).double() / len(before) ** 0.5).flatten().numpy() for moved in after])
        matrix = np.concatenate([np.stack(task, axis=1) for task in columns])
        expected = np.linalg.lstsq(matrix, np.concatenate([columns[0][0], columns[1][1]]), rcond=None)[0]
        layers = [layer for layer in solved["layers"] if layer.endswith(f".{index}")]
        assert [vector["coefficients"][layers[0]] for vector in solved["vectors"]] == pytest.approx(expected, rel=1e-3)
    merged = tmp_path / "merged"
    words = ("--coefficients", str(tmp_path / "solved.json"), "--output", str(merged))
    assert lata("merge", start, *vectors_of(start), *words)[0] == 0
    check_scores(lata, start, merged)


@pytest.mark.parametrize("start", ["masked", "decoder"])
def test_non_linearity_along_a_vector_is_that_of_the_blocks_that_transformers_runs(lata, start):
    words = ("--data", "three.jsonl", "--samples", str(ROWS), "--level", "block", "--format", "json")
    status, printed, said = lata("linearity", start, vectors_of(start)[0], *words)
    assert status == 0, said
    own, tuned, _ = bodies(start)
    hidden = block_inputs(own, texts_of(start)[0], 0)
    moved, outputs = [], []
    for scale in (0.0, 0.25, 0.5, 0.75, 1.0):
        block, other = blocks_of(AutoModel.from_pretrained(start).eval())[0], blocks_of(tuned)[0].state_dict()
        with torch.no_grad():
            for name, tensor in block.state_dict().items():
                tensor.lerp_(other[name], scale)
            outputs.append(torch.cat([first_of(block(states)).flatten(0, 1) for states in hidden]).double())
        moved.append(scale)
    whole, total, boole = (outputs[-1] - outputs[0]).norm(dim=-1), 0.0, (7 / 90, 32 / 90, 12 / 90, 32 / 90, 7 / 90)
    for first, second in np.ndindex(5, 5):
        ratio = (outputs[first] - outputs[second]).norm(dim=-1) / whole
        total += boole[first] * boole[second] * (ratio - abs(moved[first] - moved[second])) ** 2
    score = next(entry for entry in json.loads(printed)[0]["scores"] if entry["part"] == "block")
    assert score["output"] == pytest.approx(total.mean().item(), rel=1e-2)


def gram(inputs, off_diagonal):
    rows = torch.cat([states.reshape(-1, states.shape[-1]) for states in inputs]).double().numpy()
    full = rows.T @ rows / len(rows)
    return off_diagonal * full + (1 - off_diagonal) * np.diag(np.diag(full))


def fused_query(start):
    """A matrix of the first block that multiplies what enters it: its name, and whether it is stored as inputs × outputs."""
    return ("h.0.attn.c_attn.weight", True) if start == "decoder" else ("encoder.layer.0.attention.self.query.weight", False)


@pytest.mark.parametrize("start", STARTS)
def test_regression_on_samples_solves_for_the_inputs_that_each_tuned_model_has(lata, tmp_path, start):
    data, samples = [f"{task}.jsonl" for task in TASKS], ("--samples", str(ROWS), "--in-order", "false")
    status, _, said = lata("regress", start, *vectors_of(start), "--data", *data, *samples, "--output", str(tmp_path / "one"))
    assert status == 0, said
    name, turned = fused_query(start)
    grams, matrices = [], []
    for body, path, texts in zip(bodies(start)[1:], vectors_of(start), texts_of(start), strict=True):
        inputs = block_inputs(body, texts, 0)
        if start == "decoder":
            with torch.no_grad():
                inputs = [body.h[0].ln_1(states) for states in inputs]
        grams.append(gram(inputs, 0.9))
        delta = deltas_of(path)[name].double().numpy()
        matrices.append(delta.T if turned else delta)
    total = sum(grams)
    penalty = 1e-6 * np.mean(np.diag(total))
    products = sum(matrix @ own for matrix, own in zip(matrices, grams, strict=True)) + penalty * sum(matrices) / 2
    expected = products @ np.linalg.inv(total + penalty * np.eye(len(total)))
    found = deltas_of(tmp_path / "one")[name].numpy()
    np.testing.assert_allclose(found.T if turned else found, expected, rtol=1e-3, atol=1e-5)
    merged = tmp_path / "merged"
    assert lata("merge", start, str(tmp_path / "one"), "--output", str(merged))[0] == 0
    check_scores(lata, start, merged)


def by_regression(one, other):
    grams = [matrix.T @ matrix for matrix in (one, other)]
    penalty = np.mean(np.diag(sum(grams)))
    return (one @ grams[0] + other @ grams[1] + penalty * (one + other)) @ np.linalg.inv(sum(grams) + penalty * np.eye(len(grams[0])))


def by_iso(one, other):
    left, values, right = np.linalg.svd(one + other, full_matrices=False)
    return values.mean() * left @ right


def by_tsv(one, other):
    pieces = [(left[:, :8], values[:8], right[:8]) for left, values, right in (np.linalg.svd(matrix) for matrix in (one, other))]
    lefts, values, rights = (np.concatenate([piece[part] for piece in pieces], axis=axis) for part, axis in ((0, 1), (1, 0), (2, 0)))
    whitened = [left @ right for left, _, right in (np.linalg.svd(side, full_matrices=False) for side in (lefts, rights))]
    return whitened[0] * values @ whitened[1]


METHODS = {"sum": lambda one, other: one + other, "regression": by_regression, "iso": by_iso, "tsv": by_tsv}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_merges_classifiers_of_different_heads(lata, tmp_path, start, method):
    merged = tmp_path / "merged"
    words = ("--method", method, "--weighting", "none", "--output", str(merged))
    status, _, said = lata("merge", start, *vectors_of(start), *words)
    assert status == 0, said
    name, turned = fused_query(start)
    before, after = (without_prefix(load_file(f"{path}/model.safetensors"))[name].double().numpy() for path in (start, merged))
    matrices = [deltas_of(path)[name].double().numpy() for path in vectors_of(start)]
    expected = METHODS[method](*(matrix.T if turned else matrix for matrix in matrices))
    np.testing.assert_allclose(after - before, expected.T if turned else expected, atol=2e-6)
    check_scores(lata, start, merged)


@pytest.mark.parametrize("start", STARTS)
def test_vectors_of_classifiers_become_one_vector_without_samples(lata, tmp_path, start):
    status, _, said = lata("regress", start, *vectors_of(start), "--output", str(tmp_path / "one"))
    assert status == 0, said
    name, turned = fused_query(start)
    matrices = [deltas_of(path)[name].double().numpy() for path in vectors_of(start)]
    expected = by_regression(*(matrix.T if turned else matrix for matrix in matrices))
    np.testing.assert_allclose(deltas_of(tmp_path / "one")[name].numpy(), expected.T if turned else expected, atol=1e-6)
    one = TaskVector.open(tmp_path / "one")
    assert not any(word in name for name in one for word in ("classifier", "score", "cls."))
    merged = tmp_path / "merged"
    assert lata("merge", start, str(tmp_path / "one"), "--output", str(merged))[0] == 0
    check_scores(lata, start, merged)


@pytest.mark.parametrize("vectors", [("decoder", "decoder"), ("plain", "masked"), ("masked", "plain")])
def test_methods_are_tuned_with_the_head_of_each_file(lata, tmp_path, vectors):
    # Vectors of one start, and vectors of which one was made without the pooler.
    runs = [f"{start}-{task}" for start, task in zip(vectors, TASKS, strict=True)]
    onto = "decoder" if vectors[0] == "decoder" else "plain"
    found = [f"{run}/lata/task_vector" for run in runs]
    data = ["--data", *(f"{task}.jsonl" for task in TASKS), "--head", *(f"{run}/lata" for run in runs)]
    words = [*data, "--method", "regression", "--grid", "0.8", "--figure", "false", "--output", str(tmp_path / "tuned")]
    status, _, said = lata("tune", onto, *found, *words)
    assert status == 0, said
    merged = str(tmp_path / "merged")
    assert lata("merge", onto, *found, "--method", "regression", "--weighting", "none", "--scale", "0.8", "--output", merged)[0] == 0
    points = {point["scale"]: point["scores"] for point in json.loads((tmp_path / "tuned/tune.json").read_text())["points"]}
    for scale, model in ((0.0, onto), (0.8, merged)):
        assert points[scale] == {task: pytest.approx(accuracy(model, run, task)) for run, task in zip(runs, TASKS, strict=True)}


def test_a_head_with_a_pooler_of_its_own_does_not_lend_it_to_the_next_head(lata, tmp_path):
    runs, found = ["masked-three", "plain-five"], {}
    heads = {task: f"{run}/lata" for run, task in zip(runs, TASKS, strict=True)}
    for task, head in heads.items():
        status, printed, said = lata("evaluate", "plain", "--data", f"{task}.jsonl", "--head", head, "--format", "json")
        assert status == 0, said
        found[task] = json.loads(printed)[task]["accuracy"]
    status, printed, said = lata(
        "evaluate", "plain", "--data", *(f"{task}.jsonl" for task in heads), "--head", *heads.values(), "--format", "json"
    )
    assert status == 0, said
    assert {task: row["accuracy"] for task, row in json.loads(printed).items()} == found
    assert found == {task: pytest.approx(accuracy("plain", run, task)) for run, task in zip(runs, TASKS, strict=True)}
    # A masked language model has no pooler to fall back on, whichever head comes first.
    for files in (("three", "five"), ("five", "three")):
        words = ("--data", *(f"{task}.jsonl" for task in files), "--head", *(heads[task] for task in files))
        status, _, said = lata("evaluate", "masked", *words)
        assert status == 1
        assert "'masked' lacks 2: ['bert.pooler.dense.bias', 'bert.pooler.dense.weight'], which would be random numbers" in said


@pytest.mark.parametrize("words", [("solve",), ("regress", "--in-order", "false"), ("regress",)])
def test_a_vector_that_holds_what_was_left_out_of_another_counts_alone_there(lata, tmp_path, words):
    # The pooler of a masked language model is new, and so a part of the head; an encoder has one of its own.
    vectors, files = ["plain-three/lata/task_vector", "masked-five/lata/task_vector"], ["--data", "three.jsonl", "five.jsonl"]
    status, _, said = lata(words[0], "plain", *vectors, *files, *words[1:], "--output", str(tmp_path / "made"))
    assert status == 0, said
    if words[0] == "regress":
        found, alone = (deltas_of(path)["pooler.dense.bias"] for path in (tmp_path / "made", vectors[0]))
        assert torch.equal(found, alone)
        assert lata("merge", "plain", str(tmp_path / "made"), "--output", str(tmp_path / "merged"))[0] == 0
    else:
        assert lata("merge", "plain", *vectors, "--coefficients", str(tmp_path / "made"), "--output", str(tmp_path / "merged"))[0] == 0
    after, before = (load_file(path / "model.safetensors")["pooler.dense.bias"] for path in (tmp_path / "merged", tmp_path.cwd() / "plain"))
    torch.testing.assert_close(after - before, deltas_of(vectors[0])["pooler.dense.bias"], rtol=0, atol=1e-6)
