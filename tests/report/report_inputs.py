"""Runs and vectors for the tests of the report, made from numbers that the tests know."""

import html
import json
import re

from tiny_models import plus, weights

from lata_lightning.vectors.aligning import align
from lata_lightning.vectors.task_vector import TaskVector

HOSTILE = "<script>alert('x')</script>&%{y}$x$"


def layer(alignment, norm=1.0, instruction=2.0, coefficient=None):
    relative = None if alignment is None else norm / instruction
    return {
        "alignment": alignment,
        "relative_norm": relative,
        "task_norm": norm,
        "instruction_norm": 0.0 if alignment is None else instruction,
        "coefficient": coefficient,
    }


def row(step, layers, *, epoch=0, level="block", **figures):
    """A line of a history; layers are alignments by name."""
    return {
        "step": step,
        "epoch": epoch,
        "task_norm": step / 10,
        **figures,
        "level": level,
        "start": "instruct",
        "layers": {name: layer(value) for name, value in layers.items()},
        "outside": {"lm_head.weight": layer(0.5)},
    }


def write_run(directory, rows):
    directory.mkdir(parents=True)
    (directory / "history.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in rows))
    return directory


def states():
    """base → instruct → math and string, in float64: vectors that overlap in part."""
    found = {"base": weights(0)}
    found["instruct"] = plus(found["base"], weights(1), 0.5)
    found["math"] = plus(found["instruct"], weights(2), 0.1)
    found["string"] = plus(plus(found["instruct"], weights(2), 0.05), weights(3), 0.2)
    return {name: {key: tensor.double() for key, tensor in state.items()} for name, state in found.items()}


def write_vectors(directory):
    """The vectors ``instruction``, ``math`` (with coefficients) and ``string`` (without), and the differences they hold."""
    found = states()
    instruction = TaskVector.between(found["base"], found["instruct"], kind="instruction").save(directory / "instruction", dtype="float32")
    math = TaskVector.between(found["instruct"], found["math"])
    math.weighted(align(math, instruction), "linear", instruction_vector=instruction).save(directory / "math")
    TaskVector.between(found["instruct"], found["string"]).save(directory / "string")
    sides = {"instruction": ("base", "instruct"), "math": ("instruct", "math"), "string": ("instruct", "string")}
    return {name: {key: found[tuned][key] - found[start][key] for key in found[start]} for name, (start, tuned) in sides.items()}


def embedded(page, key):
    """Data and layout of a figure of a page."""
    return json.loads(re.search(rf'<script type="application/json" id="{key}-data">(.*?)</script>', page, re.DOTALL).group(1))


def table_of(page, key):
    """The cells of the data table of a figure, as a reader sees them."""
    shown = page[page.index(f'<figure id="{key}"') :]
    body = shown[shown.index("<table>") : shown.index("</table>")]
    return [
        [html.unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line, re.DOTALL)]
        for line in re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)
    ]


def charts(report):
    return {chart.key: chart for chart in report.charts}


def write_model(directory, vectors, scores=None):
    directory.mkdir()
    terms = [{"vector": vector, "scale": scale, "weighting": "none"} for vector, scale in vectors.items()]
    (directory / "merge.json").write_text(json.dumps({"onto": {"location": "models/instruct"}, "terms": terms}))
    if scores is not None:
        (directory / "scores.json").write_text(json.dumps({"model": directory.name, "scores": scores}))
    return directory
