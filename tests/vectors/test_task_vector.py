from dataclasses import replace

import pytest
import torch
from small_vectors import differences, vector, weighted
from tiny_models import BLOCKS, plus, same_bits, weights

from lata_lightning.errors import LataError, LayoutMismatchError
from lata_lightning.vectors.aligning import align
from lata_lightning.vectors.entries import TensorEntry
from lata_lightning.vectors.task_vector import TaskVector


def test_a_task_vector_is_a_mapping_to_tuned_minus_start():
    start, tuned = weights(0), weights(1)
    task = TaskVector.between(start, tuned)
    assert same_bits(dict(task), differences(start, tuned))
    assert list(task) == list(start)
    assert len(task) == len(start)
    assert task.shape("lm_head.weight") == (6, 4)
    assert "no such tensor" not in task
    with pytest.raises(KeyError, match="no such tensor"):
        task["no such tensor"]
    assert repr(task) == "TaskVector(the weights in memory − the weights in memory, 9 tensors)"
    assert (task.start, task.manifest.kind, task.unchanged) == ("instruct", "task", frozenset())


def test_an_instruction_vector_counts_from_base():
    assert TaskVector.between(weights(0), weights(1), kind="instruction").start == "base"
    assert TaskVector.between(weights(0), weights(1), start_kind="base").start == "base"


def test_the_pure_vector_is_each_layer_times_its_coefficient():
    task = weighted(vector(weights(1)))
    pure = task.pure()
    for name, tensor in weights(1).items():
        assert torch.equal(pure[name], tensor * task.coefficient_of(name))
    assert pure.manifest.coefficients is None
    assert pure.coefficient_of(f"{BLOCKS[0]}.mlp.up_proj.weight") == 1.0
    assert pure.label == f"the pure vector of {task.label}"


def test_a_pure_vector_needs_coefficients_and_a_start_from_instruct():
    with pytest.raises(LataError, match="has no coefficients: measure its alignment and apply a weighting first"):
        vector(weights(1)).pure()
    with pytest.raises(LataError, match=r"started from base, so it contains the instruction vector.*without\(instruction_vector\)"):
        weighted(vector(weights(1), start_kind="base")).pure()


def test_taking_the_instruction_vector_off_leaves_the_task_vector():
    base = weights(0, step=2**-8)
    instruct = plus(base, weights(1, step=2**-8))
    tuned = plus(instruct, weights(2, step=2**-8))
    instruction = TaskVector.between(base, instruct, kind="instruction")
    found = TaskVector.between(base, tuned, start_kind="base").without(instruction)
    assert found.start == "instruct"
    assert same_bits(dict(found), dict(TaskVector.between(instruct, tuned)))


def test_taking_off_keeps_the_coefficients_and_the_identity_of_instruct(tmp_path):
    instruction = TaskVector.between(weights(0), weights(1), kind="instruction").save(tmp_path / "instruction")
    from_base = TaskVector.between(weights(0), weights(2), start_kind="base")
    measured = from_base.weighted(align(from_base, instruction), "log", instruction_vector=instruction)
    left = measured.without(instruction)
    assert left.manifest.coefficients == measured.manifest.coefficients
    assert left.manifest.start_identity == instruction.manifest.tuned_identity
    assert measured.manifest.instruction_identity == (instruction.manifest.start_identity, instruction.manifest.tuned_identity)
    assert dict(left.save(tmp_path / "left").pure()).keys() == weights().keys()


def test_a_tensor_that_was_frozen_on_the_way_from_base_still_has_the_instruction_vector_taken_off(tmp_path):
    # Frozen at its base values, the task vector there is what is missing: minus the instruction vector.
    task, frozen = vector(weights(1), start_kind="base"), "model.norm.weight"
    entries = {name: TensorEntry(task.shape(name), "float32", unchanged=name == frozen) for name in task}
    back = TaskVector(task.tensors, replace(task.manifest, tensors=entries)).save(tmp_path / "vector")
    found = back.without(vector(weights(2), kind="instruction"))
    assert found.unchanged == frozenset()
    assert torch.equal(found[frozen], -weights(2)[frozen])
    assert torch.equal(found.save(tmp_path / "left")[frozen], -weights(2)[frozen])


def test_only_a_vector_from_base_has_an_instruction_vector_to_take_off():
    with pytest.raises(LataError, match="started from instruct: there is no instruction vector in it"):
        vector(weights(1)).without(vector(weights(2), kind="instruction"))
    short = {name: tensor for name, tensor in weights(2).items() if name != "lm_head.weight"}
    with pytest.raises(LayoutMismatchError, match=r"on one side only are 1: \['lm_head.weight'\]"):
        vector(weights(1), start_kind="base").without(vector(short, kind="instruction"))
