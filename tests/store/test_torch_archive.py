import collections
import json
import os
import zipfile

import pytest
import torch
from tiny_models import same_bits, weights
from torch import nn

from lata_lightning.errors import CorruptFileError, SourceError
from lata_lightning.store.descriptors import DESCRIPTORS
from lata_lightning.store.opening import open_source
from lata_lightning.store.torch_archive import TorchArchive

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool
]  # fmt: skip
LEGACY = [True, False]


def saved(path, content, legacy=False):
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def contents(source):
    return {name: source.read(name) for name in source.names}


def pieces(source, name):
    load, count = source.chunks(name), source.read(name).numel()
    return torch.cat([load(begin, min(begin + 5, count)).clone() for begin in range(0, count, 5)] or [torch.empty(0)])


@pytest.mark.parametrize("legacy", LEGACY)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_read_as_torch_wrote_it(tmp_path, dtype, legacy):
    tensors = {
        "full": torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype),
        "scalar": torch.tensor(1).to(dtype),
        "empty": torch.empty(0, 3, dtype=dtype),
    }
    source = open_source(saved(tmp_path / "a.bin", tensors, legacy))
    assert same_bits(contents(source), tensors)
    assert all(source.dtype(name) == dtype for name in tensors)


@pytest.mark.parametrize("legacy", LEGACY)
@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.t(), lambda t: t[1:], lambda t: t[:, 1:], lambda t: t[1:3, ::2], lambda t: t.reshape(2, 3, 5).permute(2, 0, 1), lambda t: t[2, 3],
        lambda t: t[:, :1], lambda t: t[1:1],
    ],
    ids=["transposed", "rows", "columns", "every second", "permuted", "scalar", "one column", "none"],
)  # fmt: skip
def test_views_are_read_as_the_part_they_are(tmp_path, view, legacy):
    whole = torch.arange(30.0).reshape(6, 5)
    path = saved(tmp_path / "a.pt", {"w": view(whole)}, legacy)
    source = open_source(path)
    expected = torch.load(path, weights_only=True)["w"]
    assert source.shape("w") == tuple(expected.shape)
    assert torch.equal(source.read("w"), expected)
    assert torch.equal(pieces(source, "w"), expected.reshape(-1))
    if expected.dim() > 1 and len(expected) > 1:
        part = (slice(1, 2), *(slice(0, length) for length in expected.shape[1:]))
        assert torch.equal(source.read_slice("w", part), expected[part])


@pytest.mark.parametrize("legacy", LEGACY)
def test_parameters_buffers_and_ordered_dictionaries_are_read(tmp_path, legacy):
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    source = open_source(saved(tmp_path / "a.pt", module.state_dict(), legacy))
    assert same_bits(contents(source), dict(module.state_dict()))
    with_attribute = nn.Parameter(torch.ones(2))
    with_attribute.sharded = True
    plain = {"p": nn.Parameter(torch.arange(3.0)), "q": with_attribute, "b": nn.Buffer(torch.zeros(1))}
    source = open_source(saved(tmp_path / "b.pt", collections.OrderedDict(plain), legacy))
    assert same_bits(contents(source), {name: tensor.detach() for name, tensor in plain.items()})


@pytest.mark.parametrize("legacy", LEGACY)
def test_tied_tensors_are_listed_once(tmp_path, legacy):
    shared = torch.ones(2, 2)
    tensors = {"a": shared, "b": shared, "c": shared.t(), "d": shared[1:], "empty": torch.empty(0), "also": torch.empty(0)}
    source = open_source(saved(tmp_path / "a.pt", tensors, legacy))
    assert source.names == ("a", "c", "d", "empty", "also")
    assert source.tied == {"b": "a"}


def test_a_file_inside_a_file_is_read_at_its_place(tmp_path):
    inner = saved(tmp_path / "inner", torch.arange(4.0)).read_bytes()
    (tmp_path / "outer").write_bytes(b"x" * 100 + inner + b"y" * 100)
    archive = TorchArchive(DESCRIPTORS.identify(tmp_path / "outer"), 100, 100 + len(inner))
    assert archive.tensor(archive.content).entry.shape == (4,)


def test_checksums_are_not_needed(tmp_path):
    before = torch.serialization.get_crc32_options()
    try:
        torch.serialization.set_crc32_options(False)
        path = saved(tmp_path / "a.pt", weights())
    finally:
        torch.serialization.set_crc32_options(before)
    assert same_bits(contents(open_source(path)), weights())


# Refusals


@pytest.mark.parametrize("legacy", LEGACY)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.uint16], ids=str)
def test_other_dtypes_are_refused_by_name(tmp_path, dtype, legacy):
    path = saved(tmp_path / "a.pt", {"w": torch.ones(2).to(dtype)}, legacy)
    with pytest.raises(SourceError, match=r"dtype|quantised by fp8|is not read"):
        open_source(path)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_what_is_no_plain_tensor_is_refused_by_its_class(tmp_path):
    quantised = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    odd = {
        "sparse": (torch.eye(2).to_sparse(), "_rebuild_sparse_tensor"),
        "quantised": (quantised, "_rebuild_qtensor"),
        "meta": (torch.ones(2, device="meta"), "_rebuild_meta_tensor_no_storage"),
        "expanded": (torch.ones(1).expand(5), "expanded tensors"),
    }
    for name, (tensor, words) in odd.items():
        with pytest.raises(SourceError, match=words):
            open_source(saved(tmp_path / f"{name}.pt", {"w": tensor, "v": torch.ones(1)}))


class Own(torch.Tensor):
    pass


def test_a_subclass_of_tensors_is_refused_by_its_name(tmp_path):
    with pytest.raises(SourceError, match=r"holds tensors of the class test_torch_archive.Own, which are not read"):
        open_source(saved(tmp_path / "a.pt", {"w": torch.ones(2).as_subclass(Own)}))


def test_a_whole_pickled_module_is_refused_with_the_way_on(tmp_path):
    with pytest.raises(
        SourceError, match=r"holds a torch.nn.modules.linear.Linear where a state dict is expected. Save its state_dict\(\)"
    ):
        open_source(saved(tmp_path / "a.pt", nn.Linear(2, 2)))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_torchscript_archive_is_refused(tmp_path):
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "a.pt")
    with pytest.raises(SourceError, match="TorchScript archive, which holds a program"):
        open_source(tmp_path / "a.pt")


def test_another_zip_archive_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("readme", "x")
    with pytest.raises(SourceError, match="is a zip archive that torch.save did not write"):
        open_source(tmp_path / "a.zip")


def rewritten(path, change, **options):
    """A copy of an archive, its records changed by a function of name and bytes that gives a list of both."""
    target = path.with_name("changed.pt")
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(target, "w", **options) as changed:
        for entry in whole.namelist():
            for name, data in change(entry, whole.read(entry)):
                changed.writestr(name, data)
    return target


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda name, data: [] if "/data/" in name else [(name, data)], "no readable checkpoint"),
        (lambda name, data: [(name, data[:5] if "/data/" in name else data)], "reaches beyond its values"),
        (lambda name, data: [(name, data), (name, b"")] if "/data/" in name else [(name, data)], "two records have one name"),
        (lambda name, data: [(name, b"big" if "byteorder" in name else data)], "big-endian"),
        (lambda name, data: [("../" + name, data)], "did not write"),
        (lambda name, data: [("/" + name, data)], "did not write"),
        (lambda name, data: [(name, data), ("other/data.pkl", data)], "did not write|one name"),
        (lambda name, data: [(name.replace("/data/", "/data/../../data/"), data)], "no readable checkpoint"),
    ],
    ids=["no values", "short values", "twice", "big-endian", "a path up", "an absolute path", "two roots", "a path inside"],
)
def test_an_archive_with_other_records_is_refused(tmp_path, change, words):
    path = rewritten(saved(tmp_path / "a.pt", {"w": torch.ones(4)}), change)
    with pytest.raises((SourceError, CorruptFileError), match=words):
        open_source(path)


def test_a_compressed_archive_is_refused(tmp_path):
    path = rewritten(saved(tmp_path / "a.pt", {"w": torch.zeros(1000)}), lambda *entry: [entry], compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CorruptFileError, match="is compressed or cut off"):
        open_source(path)


def test_a_tensor_that_claims_to_be_vast_takes_no_memory(tmp_path):
    import pickle

    path = saved(tmp_path / "a.pt", {"w": torch.ones(4)})

    def change(name, data):
        # The shape (4,) and the strides (1,) become (2 ** 40,) and (0,).
        vast = pickle.dumps(2**40, 2)[2:-1]
        return (
            [(name, data.replace(b"K\x04\x85", vast + b"\x85", 1).replace(b"K\x01\x85", b"K\x00\x85", 1))]
            if name.endswith("data.pkl")
            else [(name, data)]
        )

    with pytest.raises((SourceError, CorruptFileError)):
        open_source(rewritten(path, change))


@pytest.mark.parametrize("keep", [20, 100, 0.3, 0.6, -1])
def test_a_truncated_legacy_file_is_refused(tmp_path, keep):
    data = saved(tmp_path / "a.pt", weights(), legacy=True).read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(CorruptFileError, match="no readable checkpoint"):
        open_source(tmp_path / "cut.pt")


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path):
    path = saved(tmp_path / "a.pt", {"w": torch.ones(5000)})
    source = open_source(path)
    os.truncate(path, 300)
    with pytest.raises(CorruptFileError, match="has changed since|has become shorter"):
        source.read("w")


def test_extra_state_and_plain_numbers_are_no_weights(tmp_path):
    content = {"w": torch.ones(1), "layer._extra_state": [1], "step": 3, "name": "x"}
    assert open_source(saved(tmp_path / "a.pt", content)).names == ("w",)
    with pytest.raises(SourceError, match=r"must map names to tensors; others are 1: \['other'\], and 'other' is a list"):
        open_source(saved(tmp_path / "b.pt", {"w": torch.ones(1), "other": [1]}))


def test_json_is_not_taken_for_an_archive(tmp_path):
    (tmp_path / "a.pt").write_text(json.dumps({"w": 1}))
    with pytest.raises(SourceError, match="is of no format that is read here"):
        open_source(tmp_path / "a.pt")
