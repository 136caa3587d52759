"""Vectors of LoRA adapters: saved, measured and merged as factors."""

import json
import re

import pytest
import torch
from adapter_models import WEIGHTS, adapter, by_hand, close
from architectures import loaded, moved, tiny_model
from safetensors.torch import load_file, save_file
from tiny_models import read_back, same_bits

from lata_lightning import TaskVector, Term, align, forget, merge
from lata_lightning.cli.main import main
from lata_lightning.errors import BaseMismatchError, CorruptFileError
from lata_lightning.numerics.low_rank import LowRank
from lata_lightning.vectors.artefact import verify


@pytest.fixture
def no_dense(monkeypatch):
    """Forbids forming the dense matrix of an adapter."""

    def refuse(*_):
        raise AssertionError("a dense matrix was formed")

    monkeypatch.setattr(LowRank, "dense", refuse)


def dense_tuned(start, directory, seed=5, name="llama"):
    moved(loaded(name, start), seed=seed).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("low_instruction", [False, True])
@pytest.mark.parametrize("start_kind", ["instruct", "base"])
def test_alignment_of_factors_is_that_of_the_whole_differences(tmp_path, no_dense, low_instruction, start_kind):
    start, place, _ = adapter(tmp_path)
    other = adapter(tmp_path, adapter_name="other", seed=30, target_modules="all-linear")[1] if low_instruction else None
    instruct = other if low_instruction else dense_tuned(start, tmp_path / "instruct")
    vector = TaskVector.between(start, place, start_kind=start_kind)
    instruction = TaskVector.between(start, instruct, kind="instruction")
    found = align(vector, instruction, check_base=False)
    task, weights = by_hand(start, place), read_back(start)
    direction = by_hand(start, other) if low_instruction else {n: t.double() - weights[n].double() for n, t in read_back(instruct).items()}
    for layer, stats in found.layers.items():
        names = [name for name in weights if name.startswith(layer + ".")]
        one = torch.cat([torch.as_tensor(task.get(n, torch.zeros(weights[n].shape))).double().flatten() for n in names])
        along = torch.cat([torch.as_tensor(direction.get(n, torch.zeros(weights[n].shape))).double().flatten() for n in names])
        one = one - along if start_kind == "base" else one
        assert stats.alignment == pytest.approx(torch.nn.functional.cosine_similarity(one + along, along, dim=0).item(), abs=1e-9)
        assert stats.task_norm == pytest.approx(one.norm().item(), rel=1e-7)


def test_extracting_saving_aligning_and_merging_form_no_dense_difference(tmp_path, no_dense):
    start, place, model = adapter(tmp_path)
    saved = TaskVector.between(start, place).save(tmp_path / "vector")
    TaskVector.between(start, model).save(tmp_path / "from memory")
    found = align(saved, saved, check_base=False)
    weighted = saved.weighted(found, "linear")
    merge(start, [Term(weighted), Term(saved, -0.5)], tmp_path / "merged")
    forget(start, Term(weighted.pure()), tmp_path / "forgotten")
    assert verify(tmp_path / "vector") == 2 * len(by_hand(start, place))


def test_a_saved_vector_holds_the_factors_bit_for_bit_and_nothing_else(tmp_path):
    start, place, _ = adapter(tmp_path)
    saved = TaskVector.between(start, place).save(tmp_path / "vector")
    factors, stored = load_file(place / WEIGHTS), read_back(tmp_path / "vector")
    assert len(stored) == len(factors)
    for key, tensor in factors.items():
        name = re.sub(r"^base_model\.model\.(.*)\.lora_(A|B)\.weight$", r"\1.weight", key)
        assert torch.equal(stored[f"{name}.{'right' if '.lora_A.' in key else 'left'}.0"], tensor)
    entries = json.loads((tmp_path / "vector/task_vector.json").read_text())
    assert entries["format_version"] == 3
    assert entries["tensors"]["model.layers.0.self_attn.q_proj.weight"]["factors"][0]["rank"] == 3
    again = saved.save(tmp_path / "again")
    assert same_bits(read_back(tmp_path / "again"), stored)
    close(again, by_hand(start, place))


def test_a_vector_in_several_files_is_the_same_vector(tmp_path):
    start, place, _ = adapter(tmp_path)
    vector = TaskVector.between(start, place)
    vector.save(tmp_path / "one")
    many = vector.save(tmp_path / "many", max_shard_bytes=300)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    assert same_bits(read_back(tmp_path / "many"), read_back(tmp_path / "one"))
    assert verify(tmp_path / "many") == verify(tmp_path / "one")
    close(many, by_hand(start, place))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_lower_precision_of_the_factors_costs_is_measured(tmp_path, dtype):
    start, place, _ = adapter(tmp_path, modules_to_save=["norm"])
    saved = TaskVector.between(start, place).save(tmp_path / "vector", dtype=dtype)
    expected = by_hand(start, place)
    full = torch.cat([expected[name].flatten() for name in sorted(expected)])
    lower = torch.cat([saved[name].double().flatten() for name in sorted(expected)])
    loss = saved.manifest.precision_loss
    assert loss.cosine == pytest.approx(torch.nn.functional.cosine_similarity(full, lower, dim=0).item(), abs=1e-9)
    assert 0.999 < loss.cosine < 1
    assert loss.zero_fraction == 0
    assert verify(tmp_path / "vector") > 0


def test_factors_that_become_zero_in_float16_are_counted(tmp_path):
    start, place, _ = adapter(tmp_path, target_modules=["q_proj"])
    held = load_file(place / WEIGHTS)
    save_file({key: tensor * (1e-9 if "lora_B" in key else 1.0) for key, tensor in held.items()}, place / WEIGHTS)
    loss = TaskVector.between(start, place).save(tmp_path / "vector", dtype="float16").manifest.precision_loss
    assert loss.zero_fraction == pytest.approx(
        sum(t.numel() for k, t in held.items() if "lora_B" in k) / sum(t.numel() for t in held.values())
    )
    assert loss.cosine is None


def test_altered_and_cut_files_of_factors_are_noticed(tmp_path):
    start, place, _ = adapter(tmp_path)
    TaskVector.between(start, place).save(tmp_path / "vector")
    file = tmp_path / "vector/delta.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CorruptFileError, match=r"1 of 8 tensors differs: \['model\..*\.(left|right)\.0'\]"):
        verify(tmp_path / "vector")
    file.write_bytes(content[:-8])
    with pytest.raises(CorruptFileError, match="no readable safetensors"):
        TaskVector.open(tmp_path / "vector")


def test_factors_that_are_not_those_of_the_manifest_are_refused(tmp_path):
    start, place, _ = adapter(tmp_path)
    TaskVector.between(start, place).save(tmp_path / "vector")
    tensors = read_back(tmp_path / "vector")
    name = "model.layers.0.self_attn.q_proj.weight"
    for change in ({f"{name}.left.0": torch.zeros(16, 2)}, {f"{name}.left.1": torch.zeros(16, 3)}):
        save_file({**tensors, **change}, tmp_path / "vector/delta.safetensors")
        with pytest.raises(
            CorruptFileError, match=r"not those of its manifest; 1 of \d+ tensors differs: \['model.layers.0.self_attn.q_proj.weight.left"
        ):
            TaskVector.open(tmp_path / "vector")
    save_file({key: tensor for key, tensor in tensors.items() if key != f"{name}.right.0"}, tmp_path / "vector/delta.safetensors")
    with pytest.raises(CorruptFileError, match="right.0"):
        TaskVector.open(tmp_path / "vector")


@pytest.mark.parametrize("broken", [[{"rank": 3}], "factors", [3], [{"rank": "3", "scale": 1.0, "left_hash": "", "right_hash": ""}]])
def test_a_manifest_with_broken_factors_is_refused(tmp_path, broken):
    start, place, _ = adapter(tmp_path)
    TaskVector.between(start, place).save(tmp_path / "vector")
    path = tmp_path / "vector/task_vector.json"
    manifest = json.loads(path.read_text())
    manifest["tensors"]["model.layers.0.self_attn.q_proj.weight"]["factors"] = broken
    path.write_text(json.dumps(manifest))
    with pytest.raises(CorruptFileError):
        TaskVector.open(tmp_path / "vector")


def test_a_manifest_of_version_1_is_read(tmp_path):
    start, _, _ = adapter(tmp_path)
    vector = TaskVector.between(start, dense_tuned(start, tmp_path / "tuned"))
    vector.save(tmp_path / "vector")
    path = tmp_path / "vector/task_vector.json"
    manifest = json.loads(path.read_text())
    manifest["format_version"] = 1
    for entry in manifest["tensors"].values():
        del entry["factors"]
    path.write_text(json.dumps(manifest))
    opened = TaskVector.open(tmp_path / "vector")
    assert all(torch.equal(opened[name], vector[name]) for name in vector)
    assert verify(tmp_path / "vector") == len(vector)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_adapters_and_dense_vectors_rounds_the_exact_sum_once(tmp_path, dtype):
    start, one, _ = adapter(tmp_path, dtype=dtype)
    _, two, _ = adapter(tmp_path, adapter_name="two", seed=40, target_modules=["q_proj", "embed_tokens"], r=2)
    tuned, weights = dense_tuned(start, tmp_path / "tuned"), read_back(start)
    saved = TaskVector.between(start, two).save(tmp_path / "vector")
    terms = [Term(TaskVector.between(start, one), 0.5), Term(saved, -1.5), Term(TaskVector.between(start, tuned), 0.25)]
    merged = read_back(merge(start, terms, tmp_path / "merged"))
    parts = [(0.5, by_hand(start, one)), (-1.5, by_hand(start, two))]
    for name, weight in weights.items():
        exact = weight.double() + 0.25 * (read_back(tuned)[name].float() - weight.float()).double()
        exact = exact + sum(scale * part[name] for scale, part in parts if name in part)
        nearest = exact.to(dtype)
        # The order of the float64 sum may decide a tie.
        assert ((merged[name].double() - exact).abs() <= (nearest.double() - exact).abs() + 1e-15).all(), name


def test_forgetting_takes_off_what_merging_adds(tmp_path):
    start, place, _ = adapter(tmp_path)
    vector = TaskVector.between(start, place)
    merge(start, [Term(vector, -0.75)], tmp_path / "negated")
    forget(start, Term(vector, 0.75), tmp_path / "forgotten")
    assert same_bits(read_back(tmp_path / "negated"), read_back(tmp_path / "forgotten"))
    merge(start, [Term(vector), Term(vector, -1.0)], tmp_path / "same")
    assert same_bits(read_back(tmp_path / "same"), read_back(start))


def test_a_lora_vector_knows_its_start_by_its_content(tmp_path):
    start, place, _ = adapter(tmp_path)
    low = TaskVector.between(start, place).save(tmp_path / "low")
    dense = TaskVector.between(start, dense_tuned(start, tmp_path / "tuned")).save(tmp_path / "dense")
    assert low.manifest.start_identity.content_hash == dense.manifest.start_identity.content_hash is not None
    assert low.manifest.tuned_identity.content_hash is None
    tiny_model("llama", seed=9).save_pretrained(tmp_path / "elsewhere")
    foreign = TaskVector.between(tmp_path / "elsewhere", dense_tuned(tmp_path / "elsewhere", tmp_path / "tuned 2")).save(
        tmp_path / "foreign"
    )
    merge(start, [Term(low), Term(dense)], tmp_path / "merged")
    with pytest.raises(BaseMismatchError, match="different weights"):
        merge(start, [Term(low), Term(foreign)], tmp_path / "refused")


def test_the_commands_take_adapter_directories(tmp_path, capsys):
    start, place, _ = adapter(tmp_path)
    assert main(["extract", str(start), str(place), "--output", str(tmp_path / "vector")]) == 0
    close(TaskVector.open(tmp_path / "vector"), by_hand(start, place))
    assert main(["verify", str(tmp_path / "vector")]) == 0
    assert main(["merge", str(start), str(place), "--output", str(tmp_path / "merged")]) == 0
    assert main(["forget", str(place), str(tmp_path / "vector"), "--output", str(tmp_path / "forgotten")]) == 0
    exact = {name: weight.double() + by_hand(start, place).get(name, 0) for name, weight in read_back(start).items()}
    assert same_bits(read_back(tmp_path / "merged"), {name: tensor.float() for name, tensor in exact.items()})
    capsys.readouterr()
