import math

import numpy as np
import pytest
import torch
from blake3 import blake3

from lata_lightning.store.hashing import content_hash
from lata_lightning.store.opening import open_source
from lata_lightning.vectors.differences import Difference, LossMeter


def both(start, tuned, **options):
    return Difference(open_source({"w": start}), open_source({"w": tuned}), ["w"], **options)


def hash_of(tensor):
    return content_hash({"w": "blake3:" + blake3(tensor.float().numpy().tobytes()).hexdigest()})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_difference_is_formed_in_float32_or_the_wider_dtype_of_its_sides(dtype):
    start, tuned = torch.randn(3, 4).to(dtype), torch.randn(3, 4).to(dtype)
    found = both(start, tuned)
    wide = torch.promote_types(dtype, torch.float32)
    assert found.dtype("w") == wide
    assert torch.equal(found.read("w"), tuned.to(wide) - start.to(wide))
    assert torch.equal(found.chunks("w")(2, 9), (tuned.to(wide) - start.to(wide)).reshape(-1)[2:9])


def test_entries_that_are_infinite_or_nan_and_the_same_on_both_sides_have_no_difference():
    start = torch.tensor([math.inf, -math.inf, math.nan, 1.0, math.inf])
    tuned = torch.tensor([math.inf, -math.inf, math.nan, 3.0, -math.inf])
    assert both(start, tuned).read("w").tolist() == [0.0, 0.0, 0.0, 2.0, -math.inf]


def test_the_hashes_of_both_sides_are_known_once_every_tensor_was_read():
    start, tuned = torch.randn(4), torch.randn(4)
    found = both(start, tuned)
    assert found.content_hashes() == (None, None)
    found.read("w")
    assert found.content_hashes() == (hash_of(start), hash_of(tuned))
    unhashed = both(start, tuned, identify=False)
    unhashed.read("w")
    assert unhashed.content_hashes() == (None, None)


def test_hashes_of_equal_tensors_that_are_given_need_no_reading():
    known = {"w": "blake3:" + "0" * 64}
    assert both(torch.ones(2), torch.ones(2), known=known).content_hashes() == (content_hash(known), content_hash(known))


def test_a_difference_tells_its_two_sides():
    start, tuned = open_source({"w": torch.ones(2)}), open_source({"w": torch.zeros(2)})
    assert Difference(start, tuned, ["w"]).sides("w") == (tuned, start, "w")


def test_the_loss_of_several_meters_adds_up_to_that_of_all_entries():
    full = torch.randn(64) * torch.tensor([1e-9, 1.0]).repeat(32)
    lower = full.to(torch.float16)
    whole, first, second = LossMeter(), LossMeter(), LossMeter()
    whole.add(full, lower)
    first.add(full[:20], lower[:20])
    second.add(full[20:], lower[20:])
    first.add_sums(second)
    expected, stored = full.double().numpy(), lower.double().numpy()
    for meter in (whole, first):
        assert meter.result().zero_fraction == np.mean(stored[expected != 0] == 0)
        assert meter.result().cosine == pytest.approx(expected @ stored / np.linalg.norm(expected) / np.linalg.norm(stored), rel=1e-12)
    assert LossMeter().result() is None
