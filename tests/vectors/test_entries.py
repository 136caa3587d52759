from lata_lightning.vectors.entries import FactorEntry, TensorEntry, factor_names


def test_a_dense_tensor_is_stored_under_its_name_and_a_frozen_one_not_at_all():
    assert TensorEntry((3, 2), "float32", "h").stored("w") == {"w": ((3, 2), "h")}
    assert TensorEntry((3, 2), "float32", unchanged=True).stored("w") == {}


def test_factors_are_stored_under_names_and_shapes_of_their_own():
    parts = (FactorEntry(2, 0.5, "l0", "r0"), FactorEntry(1, 1.0, "l1", "r1"))
    assert TensorEntry((3, 4, 5), "float32", factors=parts).stored("w") == {
        "w.left.0": ((3, 2), "l0"),
        "w.right.0": ((2, 20), "r0"),
        "w.left.1": ((3, 1), "l1"),
        "w.right.1": ((1, 20), "r1"),
    }
    assert factor_names("w", 1) == ("w.left.1", "w.right.1")
