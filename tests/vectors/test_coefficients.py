import pytest
from small_vectors import vector, weighted
from tiny_models import same_bits, weights

from lata_lightning.errors import WeightingError
from lata_lightning.vectors.aligning import align


def test_weighting_returns_a_new_vector_over_the_same_tensors():
    task = vector(weights(1))
    found = weighted(task, outside=0.25)
    assert task.manifest.coefficients is None
    assert task.coefficient_of("lm_head.weight") == 1.0
    assert sorted(found.manifest.coefficients.values()) == [0.5, 1.0]
    assert found.coefficient_of("lm_head.weight") == 0.25
    assert {stats.coefficient for stats in found.manifest.alignment.outside.values()} == {0.25}
    assert same_bits(dict(found), dict(task))


@pytest.mark.parametrize("level", ["block", "submodule", "tensor"])
def test_a_tensor_has_the_coefficient_of_its_layer_at_every_level(level):
    task = vector(weights(1))
    found = task.weighted(align(task, vector(weights(7)), level), "linear")
    for layer, names in task.layers.layers(level).items():
        assert {found.coefficient_of(name) for name in names} == {found.manifest.coefficients[layer]}
    assert len(set(found.manifest.coefficients.values())) == {"block": 2, "submodule": 6, "tensor": 6}[level]


def test_an_unknown_rule_is_refused_when_weighting():
    with pytest.raises(WeightingError, match="unknown weighting 'square'"):
        weighted(vector(weights(1)), "square")
