import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save

from lata_lightning.errors import LataError
from lata_lightning.store.dtypes import dtype_name, float_dtype, is_known, is_readable, item_size, readable_code, torch_dtype

READABLE = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip
OTHERS = [torch.complex64, torch.uint64, torch.uint32, torch.uint16, torch.float8_e4m3fn, torch.float8_e5m2]


def code_in_file(dtype):
    """The code that the safetensors library itself writes for a dtype."""
    data = save({"a": torch.zeros(3, dtype=dtype)})
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["a"]["dtype"]


@pytest.mark.parametrize("dtype", READABLE + OTHERS, ids=str)
def test_codes_widths_and_names_are_those_of_the_safetensors_library_and_of_torch(dtype):
    code = code_in_file(dtype)
    assert torch_dtype(code) is dtype
    assert item_size(code) == dtype.itemsize
    assert f"torch.{dtype_name(code)}" == str(dtype)
    assert is_known(code)
    assert is_readable(code) == (dtype in READABLE)
    assert readable_code(dtype) == (code if dtype in READABLE else None)


def test_a_dtype_that_the_format_lacks_has_no_code():
    assert readable_code(torch.complex128) is None
    assert readable_code(torch.quint8) is None


def test_a_code_that_nobody_knows_is_its_own_name():
    assert not is_known("F4")
    assert not is_readable("F4")
    assert dtype_name("F4") == "F4"


def test_an_unknown_dtype_to_write_in_is_refused_with_the_choices():
    assert float_dtype("bfloat16") is torch.bfloat16
    with pytest.raises(LataError, match="unknown dtype 'float64'; choose one of float32, bfloat16, float16"):
        float_dtype("float64")


def test_the_table_is_read_without_importing_torch():
    code = "import sys; from lata_lightning.store.dtypes import item_size; item_size('BF16'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
