import pytest
from safetensors.torch import save_file
from small_vectors import vector
from tiny_models import weights, write_model

from lata_lightning.errors import CorruptFileError, SourceError
from lata_lightning.store.model_directory import verify_merged


@pytest.fixture
def merged(tmp_path):
    from lata_lightning.merging.merge import Term, merge

    return merge(weights(0), [Term(vector(weights(1)))], tmp_path / "merged")


def test_a_merged_model_is_verified_by_its_record(merged):
    assert verify_merged(merged) == 9
    file = merged / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptFileError, match=r"does not match its record: 1 of \d+ tensors differs: "):
        verify_merged(merged)
    tensors = weights(0)
    del tensors["lm_head.weight"]
    save_file(tensors, file)
    with pytest.raises(CorruptFileError, match=r"9 of \d+ tensors differ, first: "):
        verify_merged(merged)


def test_a_directory_without_a_record_cannot_be_verified(tmp_path):
    with pytest.raises(SourceError, match="holds neither task_vector.json nor merge.json"):
        verify_merged(write_model(tmp_path / "model", weights()))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"tensors": 3}', '{"tensors": ["a"]}'])
def test_a_record_that_is_none_is_refused(merged, text):
    (merged / "merge.json").write_text(text)
    with pytest.raises(CorruptFileError, match="is no merge record|is no JSON|must hold a JSON object"):
        verify_merged(merged)
