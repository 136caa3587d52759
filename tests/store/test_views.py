import pytest
import torch
from blake3 import blake3
from in_factors import InFactors
from tiny_models import weights

from lata_lightning.store.hashing import hash_values
from lata_lightning.store.opening import open_source
from lata_lightning.store.sources import Origin
from lata_lightning.store.views import Chosen, Computed, Fingerprinted, Scaled, View, Zeros


def test_a_fingerprint_is_taken_once_while_a_tensor_is_read():
    source = Fingerprinted(open_source(weights()))
    assert source.hashes == {}
    source.read("model.norm.weight")
    source.read("model.norm.weight")
    assert source.hashes == {"model.norm.weight": hash_values(weights()["model.norm.weight"])}


def test_a_view_has_other_names_for_the_same_tensors():
    view = View(open_source({"a": torch.ones(2, 3)}), {"b": "a"})
    assert (view.names, view.shape("b"), view.dtype("b"), view.read("b").sum().item()) == (("b",), (2, 3), torch.float32, 6.0)


def test_a_fingerprint_is_taken_of_chunks_that_make_up_a_tensor_and_of_no_others():
    tensor = torch.randn(7, 3)
    source = Fingerprinted(open_source({"w": tensor}))
    source.chunks("w")(3, 9)
    source.read_slice("w", (slice(0, 4),))
    assert source.hashes == {}
    load = source.chunks("w")
    load(0, 10)
    load(10, 21)
    assert source.hashes == {"w": "blake3:" + blake3(tensor.numpy().tobytes()).hexdigest()}


def test_a_view_asks_its_source_for_everything_and_has_its_origin(tmp_path):
    factors = InFactors(open_source({"a": torch.ones(4, 3)}), {"a": (torch.ones(4, 2), torch.ones(2, 3))})
    view = View(factors, {"b": "a"})
    assert view.low_rank("b").rank == 2
    assert torch.equal(view.read("b"), torch.full((4, 3), 2.0))
    assert torch.equal(view.chunks("b")(3, 6).float(), torch.full((3,), 2.0))
    assert (view.origin_name("b"), view.stored_name("b")) == ("a", "a")
    assert view.origin is factors.origin
    assert view.sides("b") is view.byte_range("b") is None


@pytest.mark.parametrize("in_factors", [False, True])
def test_a_scaled_source_multiplies_whole_tensors_chunks_and_factors(in_factors):
    left, right = torch.randn(5, 2), torch.randn(2, 3)
    source = open_source({"a": left @ right, "b": torch.ones(5, 3)})
    if in_factors:
        source = InFactors(source, {"a": (left, right)})
    scaled = Scaled(source, {"a": -2.0, "b": 0.5}.get, "scaled")
    expected = -2.0 * (left @ right)
    torch.testing.assert_close(scaled.read("a"), expected)
    torch.testing.assert_close(scaled.chunks("a")(3, 9).float(), expected.reshape(-1)[3:9])
    assert (scaled.low_rank("a") is not None) == in_factors
    assert torch.equal(scaled.read("b"), torch.full((5, 3), 0.5))
    assert (scaled.label, scaled.names, scaled.shape("a")) == ("scaled", ("a", "b"), (5, 3))


def test_each_chosen_tensor_comes_from_its_own_source_under_its_own_name():
    one, other = open_source({"a": torch.ones(2)}), View(open_source({"x": torch.zeros(3)}), {"b": "x"})
    chosen = Chosen({"a": one, "b": other}, "both")
    assert (chosen.names, chosen.label) == (("a", "b"), "both")
    assert (chosen.read("a").tolist(), chosen.read("b").tolist()) == ([1.0, 1.0], [0.0, 0.0, 0.0])
    assert chosen.origin_name("b") == "b"


def test_zeros_have_the_names_and_shapes_of_another_source_in_float32():
    zeros = Zeros(open_source({"a": torch.ones(2, 3, dtype=torch.bfloat16)}))
    assert torch.equal(zeros.read("a"), torch.zeros(2, 3))
    assert torch.equal(zeros.chunks("a")(1, 5), torch.zeros(4))
    assert (zeros.names, zeros.shape("a"), zeros.dtype("a")) == (("a",), (2, 3), torch.float32)


def test_a_computed_source_needs_no_more_than_how_to_read_a_tensor():
    class Squares(Computed):
        def read(self, name):
            return self._like.read(name) ** 2

    squares = Squares(open_source({"a": torch.arange(6.0).reshape(2, 3)}), Origin("squares"))
    assert squares.chunks("a")(2, 5).tolist() == [4.0, 9.0, 16.0]
    assert squares.read_slice("a", (slice(1, 2),)).tolist() == [[9.0, 16.0, 25.0]]
    assert (squares.label, squares.dtype("a")) == ("squares", torch.float32)
