import pytest
import torch
from report_inputs import charts

from lata_lightning.errors import BaseMismatchError, LayoutMismatchError
from lata_lightning.report.contents import build
from lata_lightning.report.measuring import measure_together
from lata_lightning.vectors.task_vector import TaskVector


def test_cosines_of_a_zero_vector_are_undefined(vectors, tmp_path):
    directory, differences = vectors
    TaskVector.between(differences["math"], differences["math"]).save(tmp_path / "zero")
    found = charts(build([tmp_path / "zero", directory / "math"]))
    assert found["pairs-whole"].values[0] == (None, None)
    assert "no cosine is defined" in found["pairs-whole"].summary


def test_vectors_of_other_layouts_are_refused(vectors, tmp_path):
    weight = {"model.layers.0.mlp.up_proj.weight": torch.ones(2, 2)}
    TaskVector.between(weight, weight).save(tmp_path / "other")
    with pytest.raises(LayoutMismatchError, match="must hold the same tensors"):
        build([vectors[0] / "math", tmp_path / "other"])


def test_vectors_of_other_blocks_are_refused(vectors, tmp_path):
    directory, differences = vectors
    start = {name: torch.zeros_like(tensor) for name, tensor in differences["math"].items()}
    TaskVector.between(start, differences["math"], layers=r"^model\.layers").save(tmp_path / "one-block")
    with pytest.raises(LayoutMismatchError, match="must have the same blocks to be shown together"):
        build([directory / "math", tmp_path / "one-block"])


def test_an_instruction_vector_of_other_weights_is_refused_unless_told_otherwise(vectors, tmp_path):
    directory, differences = vectors
    TaskVector.between(differences["math"], differences["string"], kind="instruction").save(tmp_path / "stranger")
    with pytest.raises(BaseMismatchError, match="different weights"):
        build([directory / "math"], tmp_path / "stranger")
    assert build([directory / "math"], tmp_path / "stranger", check_base=False).charts


def test_measuring_reports_all_bytes_and_leaves_the_instruction_vector_unaligned_with_itself(vectors):
    opened = [TaskVector.open(vectors[0] / name) for name in ("math", "instruction")]
    seen = []
    measured = measure_together(opened, opened[1], progress=lambda done, size: seen.append((done, size)))
    size = 2 * 4 * sum(tensor.numel() for tensor in vectors[1]["math"].values())
    assert seen[-1] == (size, size)
    assert len(seen) == len(opened[0])
    assert all(moments.instruction == 0 for moments in measured.tables[1].values())


def test_no_vectors_measure_to_nothing():
    measured = measure_together([])
    assert (measured.tables, dict(measured.pairs)) == ((), {})
