import pytest
import torch

from lata_lightning.errors import LayoutMismatchError, SourceError
from lata_lightning.store.opening import open_source
from lata_lightning.store.pairing import pair


def test_sides_of_another_architecture_vocabulary_or_shape_are_refused():
    with pytest.raises(
        LayoutMismatchError, match=r"must hold the same tensors; on one side only are 2: \['a', 'b'\]. Are both of one architecture"
    ):
        pair(open_source({"a": torch.ones(1)}), open_source({"b": torch.ones(1)}))
    with pytest.raises(LayoutMismatchError, match=r"same vocabulary; lm_head.weight has 3 rows in one and 4 in the other"):
        pair(open_source({"lm_head.weight": torch.ones(3, 2)}), open_source({"lm_head.weight": torch.ones(4, 2)}))
    with pytest.raises(LayoutMismatchError, match=r"1 of 1 tensors differs: \['w'\]; shapes of w: \(2, 3\) and \(3, 2\)"):
        pair(open_source({"w": torch.ones(2, 3)}), open_source({"w": torch.ones(3, 2)}))


def test_quantised_weights_are_refused():
    with pytest.raises(LayoutMismatchError, match=r"integers on one side only are 1: \['w'\]. Is one of them quantised"):
        pair(open_source({"w": torch.ones(2, dtype=torch.int8)}), open_source({"w": torch.ones(2)}))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64])
def test_dtypes_that_no_difference_can_be_taken_of_are_refused(dtype):
    odd = {"w": torch.ones(2).to(dtype)}
    with pytest.raises(SourceError, match=r"plain floating or integer tensors; other dtypes have 1: \['w'\]"):
        pair(open_source(odd), open_source(odd))
