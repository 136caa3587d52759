import json

import torch
from small_vectors import vector, weighted
from tiny_models import BLOCKS, weights, write_model

from lata_lightning.vectors.aligning import align
from lata_lightning.vectors.task_vector import TaskVector


def test_the_card_is_yaml_a_hub_accepts_with_one_row_for_each_layer(tmp_path):
    import yaml

    write_model(tmp_path / "instruct", weights(0))
    task = weighted(TaskVector.between(tmp_path / "instruct", weights(1)))
    task.save(tmp_path / "vector")
    _, front, text = (tmp_path / "vector" / "README.md").read_text("utf-8").split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "lata_lightning",
        "base_model": [str(tmp_path / "instruct")],
        "tags": ["task-vector", "task-arithmetic", "lata"],
    }
    assert "not a model" in text
    for block in BLOCKS:
        stats = task.manifest.alignment.layers[block]
        assert f"| {block} | {stats.alignment:.4f} | {stats.relative_norm:.4f} | {stats.coefficient:.4f} |" in text


def test_the_card_of_an_instruction_vector_says_what_it_is(tmp_path):
    vector(weights(1), kind="instruction").save(tmp_path / "vector")
    text = (tmp_path / "vector" / "README.md").read_text()
    assert "An instruction vector (instruct − base)" in text
    assert "base_model" not in text
    assert "| start | in memory | `blake3:" in text


def test_the_card_says_when_the_alignments_are_too_flat_to_rank(tmp_path):
    task = vector({name: torch.ones_like(tensor) for name, tensor in weights().items()})
    flat = task.weighted(align(task, task), "linear")
    flat.save(tmp_path / "flat")
    assert "spread by 0.0000 only: too little to rank the layers by" in (tmp_path / "flat" / "README.md").read_text()
    assert json.loads((tmp_path / "flat" / "task_vector.json").read_text())["alignment_too_flat_to_rank"] is True


def test_an_undefined_alignment_is_a_dash_in_the_card(tmp_path):
    task = vector(weights(1))
    none = task.weighted(align(task, vector({name: torch.zeros_like(tensor) for name, tensor in weights().items()})), "none")
    none.save(tmp_path / "vector")
    assert f"| {BLOCKS[0]} | – | – | 1.0000 |" in (tmp_path / "vector" / "README.md").read_text()
