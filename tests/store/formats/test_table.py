import json

import pytest
from safetensors.torch import save_file
from tiny_models import weights

from lata_lightning.errors import CorruptFileError, SourceError
from lata_lightning.store.formats.table import FORMATS
from lata_lightning.store.opening import open_source
from lata_lightning.vectors.inspection import describe


@pytest.mark.parametrize("data", [b"", b"x", b"garbage" * 100, b"\x00" * 100, json.dumps({"a": 1}).encode()])
@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.gguf", "model", "model.ckpt"])
def test_a_file_of_no_format_is_refused(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(SourceError if data else CorruptFileError, match="is of no format that is read here" if data else "is empty"):
        open_source(tmp_path / name)


def test_every_format_has_a_name_of_its_own():
    assert len({known.name for known in FORMATS}) == len(FORMATS)


@pytest.mark.parametrize("name", ["any.safetensors", "any.bin", "any", "any.ckpt"])
def test_a_safetensors_file_is_known_by_its_content(tmp_path, name):
    save_file(weights(), tmp_path / name)
    assert open_source(tmp_path / name).names == tuple(sorted(weights()))
    assert describe(tmp_path / name)["format"] == "safetensors file"
