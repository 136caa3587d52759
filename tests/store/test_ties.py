import pytest
import torch
from tiny_models import tied_to_embedding, weights, write_model

from lata_lightning.errors import LayoutMismatchError
from lata_lightning.store.opening import open_source
from lata_lightning.store.pairing import named_like, pair


def test_tied_tensors_go_by_the_name_that_the_other_side_has():
    embedding = torch.ones(2, 2)
    source = open_source({"net.head.weight": embedding, "net.embed.weight": embedding, "net.w": torch.zeros(1)})
    named = named_like(source, open_source({"embed.weight": torch.zeros(2, 2), "w": torch.zeros(1)}))
    assert set(named.names) == {"embed.weight", "w"}
    assert torch.equal(named.read("embed.weight"), embedding)


@pytest.mark.parametrize("config_on", ["start", "tuned"])
def test_a_copy_of_tied_weights_on_one_side_counts_once(tmp_path, config_on):
    twice = write_model(tmp_path / "twice", tied_to_embedding(weights(), twice=True), config={"tie_word_embeddings": config_on == "start"})
    once = write_model(tmp_path / "once", tied_to_embedding(weights(), twice=False), config={"tie_word_embeddings": config_on == "tuned"})
    start, tuned = pair(open_source(twice), open_source(once))
    assert set(start.names) == set(tuned.names) == set(weights()) - {"lm_head.weight"}


def test_a_copy_of_a_tensor_is_no_tied_weight_where_no_config_says_so(tmp_path):
    twice = write_model(tmp_path / "twice", tied_to_embedding(weights(), twice=True))
    once = write_model(tmp_path / "once", tied_to_embedding(weights(), twice=False))
    with pytest.raises(LayoutMismatchError, match=r"on one side only are 1: \['lm_head.weight'\]"):
        pair(open_source(twice), open_source(once))
