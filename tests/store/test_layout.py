import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lata_lightning.errors import CorruptFileError, SourceError
from lata_lightning.store.layout import Entry, check_readable, joined, safetensors_spans, sizes, weights_facts

TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(4, dtype=torch.bfloat16), "c": torch.zeros(0, 2, dtype=torch.int64)}


def test_spans_tell_the_names_shapes_and_bytes_that_the_safetensors_library_reads(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(TENSORS, path)
    spans, data = safetensors_spans(path), path.read_bytes()
    with safe_open(path, "pt") as library:
        assert list(spans) == sorted(library.keys())
        for name, span in spans.items():
            assert span.entry.shape == tuple(library.get_slice(name).get_shape())
            assert span.entry.code == library.get_slice(name).get_dtype()
            expected = library.get_tensor(name).view(torch.uint8).numpy().tobytes() if library.get_tensor(name).numel() else b""
            assert data[span.begin : span.begin + len(expected)] == expected


def test_files_may_share_a_tensor_of_equal_values_and_no_other(tmp_path):
    for name, value in (("one", 1.0), ("same", 1.0), ("other", 2.0)):
        save_file({"w": torch.full((3,), value), name: torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    one, same, other = (safetensors_spans(tmp_path / f"{name}.safetensors") for name in ("one", "same", "other"))
    assert set(joined([one, same])) == {"w", "one", "same"}
    with pytest.raises(CorruptFileError, match=r"must hold the same values of each tensor; they differ in 1: \['w'\]"):
        joined([one, other])


def test_tensors_of_dtypes_and_shapes_that_cannot_be_read_are_refused_by_name():
    check_readable("it", {"a": Entry((2, 3), "F32")})
    with pytest.raises(SourceError, match=r"it holds tensors of dtype 'F8_E4M3', which are not supported: 1: \['b'\]"):
        check_readable("it", {"a": Entry((2,), "F32"), "b": Entry((2,), "F8_E4M3")})
    with pytest.raises(CorruptFileError, match=r"it holds tensors of impossible shapes, 1: \['a'\]"):
        check_readable("it", {"a": Entry((1 << 40, 1 << 20), "F32")})


def test_facts_count_tensors_entries_dtypes_and_blocks():
    entries = {
        "model.layers.0.self_attn.q_proj.weight": Entry((4, 3), "BF16"),
        "model.layers.1.self_attn.q_proj.weight": Entry((4, 3), "BF16"),
        "model.norm.weight": Entry((5,), "F32"),
    }
    assert sizes(entries) == {"tensors": 3, "parameters": 29, "dtype": "bfloat16, float32"}
    facts = weights_facts(entries)
    assert (facts["blocks"], facts["first and last block"]) == (2, "model.layers.0 … model.layers.1")
    assert facts["outside the blocks"] == {"model.norm.weight": "final_norm"}
