"""Peft adapter directories and models against sums that are formed in float64 from the stored factors, by the definition of LoRA."""

import json
import math
import re
import warnings

import peft
import pytest
import torch
import transformers
from architectures import ARCHITECTURES, both_precisions, loaded, moved, outputs_of, tiny_model
from safetensors.torch import load_file, save_file
from tiny_models import llama, read_back, same_bits, write_checkpoint

from lata_lightning import TaskVector, Term, align, forget, merge
from lata_lightning.cli.main import main
from lata_lightning.errors import BaseMismatchError, CorruptFileError, LataError, LayoutMismatchError, SourceError
from lata_lightning.numerics.low_rank import LowRank
from lata_lightning.store.opening import open_source
from lata_lightning.vectors.artefact import verify

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
TARGETS = {
    "llama": ["q_proj", "down_proj"],
    "gemma2": ["q_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "gpt_neox": ["query_key_value"],
    "bert": ["query", "dense"],
    "bert_classifier": ["query", "dense"],
    "t5": ["q", "v", "wo"],
    "bart": ["q_proj", "fc1"],
    "vit": ["q_proj", "v_proj", "projection"],
    "clip_vision": ["q_proj", "patch_embedding"],
    "mixtral": ["q_proj", "v_proj"],
    "qwen3_moe": ["q_proj", "v_proj"],
}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def wrapped(model, *, seed=3, size=0.1, autocast=True, config=peft.LoraConfig, **options):
    """A model wrapped by peft, every trained parameter moved by noise as if trained."""
    options = {"r": 3, "lora_alpha": 5, **options} if config is peft.LoraConfig else options
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(model, config(**options), autocast_adapter_dtype=autocast)
    noise_on(model, seed + 1, size)
    return model


def noise_on(model, seed, size=0.1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(parameter.double() + size * noise)


def adapter(directory, name="llama", *, tied=False, dtype=torch.float32, adapter_name="adapter", **options):
    """Saves a start and an adapter on it; gives both directories and the model in memory."""
    start, place = directory / "start", directory / adapter_name
    if not start.exists():
        tiny_model(name, tied=tied, dtype=dtype).save_pretrained(start)
    model = wrapped(loaded(name, start), **{"target_modules": TARGETS[name], **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(place)
    return start, place, model


def scale_of(config, stem, rank):
    alpha = next((value for key, value in config["alpha_pattern"].items() if re.search(rf"(^|\.){key}$", stem)), config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config["use_rslora"] else rank)


def names_in_file(start):
    """The name in the files for each name in the module, found by the values."""
    kind = json.loads((start / "config.json").read_text())["architectures"][0]
    module = getattr(transformers, kind).from_pretrained(start, dtype="auto")
    weights = read_back(start)
    pairs = (
        (name, [key for key, weight in weights.items() if torch.equal(weight, tensor)]) for name, tensor in module.state_dict().items()
    )
    # Fused experts lie in the files one by one.
    return {name: found[0] for name, found in pairs if found}


def by_hand(start, place):
    """What an adapter directory adds, in float64, from its two files and the files of its start alone; trained copies minus the originals."""
    config, held, weights = json.loads((place / CONFIG).read_text()), load_file(place / WEIGHTS), read_back(start)
    file_name = names_in_file(start)
    found = {}
    for key, tensor in held.items():
        stem = key.removeprefix("base_model.model.")
        if ".lora_A." in key or stem.endswith(".lora_embedding_A"):
            embedding = stem.endswith(".lora_embedding_A")
            stem = stem.removesuffix(".lora_embedding_A").removesuffix(".lora_A.weight")
            first = tensor.double()
            second = held[key.replace("_embedding_A", "_embedding_B").replace(".lora_A.", ".lora_B.")].double()
            product = torch.einsum("or,ri->oi", second.reshape(second.shape[0], -1), first.reshape(first.shape[0], -1))
            product = product.T if embedding or config["fan_in_fan_out"] else product
            name = file_name[f"{stem}.weight"]
            delta = scale_of(config, stem, first.shape[0]) * product.reshape(weights[name].shape)
            found[name] = found.get(name, 0) + delta
        elif ".lora_" not in key and ".base_layer.weight" not in key:
            name = file_name[stem.replace(".base_layer.", ".")]
            found[name] = tensor.double() - weights[name].double()
    return {name: delta for name, delta in found.items() if delta.any()}


def close(vector, expected):
    """The vector has these differences and no others; float32 may round each once."""
    for name in vector:
        if name in expected:
            torch.testing.assert_close(
                vector[name].double(), expected[name].double(), rtol=2e-7, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}"
            )
        else:
            assert not vector[name].any(), name
    assert set(expected) <= set(vector)


@pytest.fixture
def no_dense(monkeypatch):
    """Forbids forming the dense matrix of an adapter."""

    def refuse(*_):
        raise AssertionError("a dense matrix was formed")

    monkeypatch.setattr(LowRank, "dense", refuse)


# --- architectures -------------------------------------------------------------------------------------------------------------------------


@both_precisions
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_adapter_adds_what_its_factors_say_on_every_architecture(tmp_path, name, dtype):
    start, place, model = adapter(tmp_path, name, dtype=dtype, fan_in_fan_out=name == "gpt2")
    expected, weights = by_hand(start, place), read_back(start)
    assert expected
    vector = TaskVector.between(start, place)
    close(vector, expected)
    close(TaskVector.between(start, model), expected)
    assert {entry for entry in vector if vector.low_rank(entry) is not None} == set(expected)
    assert vector.unchanged == set(vector) - set(expected)
    # Peft forms the sum in the weights' precision: nowhere is it closer to the exact sum than ours.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_and_unload().save_pretrained(tmp_path / "peft")
    theirs, ours = read_back(tmp_path / "peft"), read_back(merge(start, [Term(vector)], tmp_path / "merged"))
    assert set(ours) == set(weights)
    for entry, weight in weights.items():
        assert ours[entry].dtype == dtype
        if entry in expected:
            exact = weight.double() + expected[entry]
            assert ((ours[entry].double() - exact).abs() <= (theirs[entry].double() - exact).abs()).all(), entry
        else:
            assert torch.equal(ours[entry], weight)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "vit", "mixtral"])
def test_the_merged_model_answers_as_the_adapted_one(tmp_path, name):
    start, place, model = adapter(tmp_path, name, fan_in_fan_out=name == "gpt2")
    merge(start, [Term(TaskVector.between(start, place))], tmp_path / "merged")
    torch.testing.assert_close(outputs_of(name, loaded(name, tmp_path / "merged")), outputs_of(name, model), rtol=1e-4, atol=1e-5)


# --- kinds of LoRA -------------------------------------------------------------------------------------------------------------------------

KINDS = {
    "rank and alpha patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 7}},
    "rsLoRA": {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "a regular expression": {"target_modules": r".*\.0\..*(q|up)_proj"},
    "all linear layers": {"target_modules": "all-linear"},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "trained copies": {"modules_to_save": ["lm_head", "norm"]},
    "gaussian start": {"init_lora_weights": "gaussian"},
    "orthogonal start": {"init_lora_weights": "orthogonal", "r": 4},
    "start other than zero": {"init_lora_weights": False},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_plain_lora_is_read_from_its_directory_and_from_memory(tmp_path, kind):
    start, place, model = adapter(tmp_path, **KINDS[kind])
    expected = by_hand(start, place)
    close(TaskVector.between(start, place), expected)
    close(TaskVector.between(start, model), expected)
    close(TaskVector.between(start, place).save(tmp_path / "vector"), expected)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trained_biases_are_part_of_the_vector(tmp_path, bias):
    start, place, model = adapter(tmp_path, "bert", bias=bias, target_modules=["query"])
    expected = by_hand(start, place)
    biases = {name for name in expected if name.endswith(".bias")}
    assert len(biases) == (2 if bias == "lora_only" else sum(name.endswith("bias") for name in read_back(start)))
    close(TaskVector.between(start, place), expected)
    close(TaskVector.between(start, model), expected)


@pytest.mark.parametrize("ensured", [False, True])
@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head", "q_proj"], ["embed_tokens", "lm_head"]], ids=str)
def test_adapters_on_tied_embeddings_add_up_as_merging_adds_them(tmp_path, targets, ensured):
    start, place, model = adapter(tmp_path, tied=True, target_modules=targets, ensure_weight_tying=ensured)
    expected = by_hand(start, place)
    assert "model.embed_tokens.weight" in expected
    assert not set(expected) & {"lm_head.weight"}
    close(TaskVector.between(start, place), expected)
    close(TaskVector.between(start, model), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.double().merge_and_unload().save_pretrained(tmp_path / "peft")
    for name, tensor in read_back(tmp_path / "peft").items():
        torch.testing.assert_close(tensor, read_back(start)[name].double() + expected.get(name, 0), rtol=1e-6, atol=1e-6)


def test_a_trained_copy_of_a_tied_weight_has_to_stay_tied(tmp_path):
    start, place, model = adapter(tmp_path, tied=True, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    expected = by_hand_tied(start, place)
    assert "model.embed_tokens.weight" in expected
    close(TaskVector.between(start, place), expected)
    close(TaskVector.between(start, model), expected)
    for index, copies in enumerate((["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"])):
        _, place, model = adapter(tmp_path, modules_to_save=copies, adapter_name=f"untied {index}")
        for tuned in (place, model):
            with pytest.raises(LataError, match=r"2: \['lm_head.weight', 'model.embed_tokens.weight'\].*ensure_weight_tying"):
                TaskVector.between(start, tuned)


def by_hand_tied(start, place):
    """As by_hand, of a file that holds the one trained copy of a tied weight under both its names."""
    held = load_file(place / WEIGHTS)
    assert torch.equal(held.pop("base_model.model.lm_head.weight"), held["base_model.model.model.embed_tokens.weight"])
    place.with_name("once").mkdir()
    save_file(held, place.with_name("once") / WEIGHTS)
    (place.with_name("once") / CONFIG).write_text((place / CONFIG).read_text())
    return by_hand(start, place.with_name("once"))


def test_t5_with_an_adapter_on_its_shared_embedding_is_what_merging_gives(tmp_path):
    start, place, model = adapter(tmp_path, "t5", tied=True, target_modules=["shared", "q"])
    vectors = [TaskVector.between(start, tuned) for tuned in (place, model)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.double().merge_and_unload().save_pretrained(tmp_path / "peft")
    for name, tensor in read_back(tmp_path / "peft").items():
        for vector in vectors:
            torch.testing.assert_close(vector[name].double(), tensor - read_back(start)[name].double(), rtol=1e-5, atol=1e-7)
    assert vectors[0].low_rank("shared.weight") is not None


@pytest.mark.parametrize("active", [["one", "two"], ["two"], ["one"]], ids=str)
def test_of_several_adapters_in_memory_the_active_ones_count(tmp_path, active):
    start, _, model = adapter(tmp_path, target_modules=["q_proj"], adapter_name="unused")
    for name, targets, rank in (("one", ["q_proj", "v_proj"], 2), ("two", ["q_proj", "up_proj"], 4)):
        model.add_adapter(name, peft.LoraConfig(r=rank, lora_alpha=3, target_modules=targets, init_lora_weights=False))
    model.base_model.set_adapter(active)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "both", selected_adapters=["one", "two"])
    expected = {}
    for name in active:
        for key, delta in by_hand(start, tmp_path / "both" / name).items():
            expected[key] = expected.get(key, 0) + delta
    vector = TaskVector.between(start, model)
    close(vector, expected)
    close(vector.save(tmp_path / "vector"), expected)
    assert vector.low_rank("model.layers.0.self_attn.q_proj.weight").rank == sum({"one": 2, "two": 4}[name] for name in active)


def test_a_copy_in_an_adapter_that_is_not_active_leaves_the_original_in_its_place(tmp_path):
    start, _, model = adapter(tmp_path, modules_to_save=["lm_head"], target_modules=["q_proj"])
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    model.set_adapter("other")
    vector = TaskVector.between(start, model)
    assert set(vector) == set(read_back(start))
    assert not vector["lm_head.weight"].any()
    assert vector["model.layers.0.self_attn.v_proj.weight"].any()
    assert not vector["model.layers.0.self_attn.q_proj.weight"].any()


@pytest.mark.parametrize("autocast", [True, False], ids=["float32 factors", "bfloat16 factors"])
def test_a_half_precision_base_with_factors_of_either_precision_is_exact(tmp_path, autocast):
    start, place, model = adapter(tmp_path, dtype=torch.bfloat16, autocast=autocast)
    held = load_file(place / WEIGHTS)
    assert {tensor.dtype for tensor in held.values()} == {torch.float32 if autocast else torch.bfloat16}
    close(TaskVector.between(start, place), by_hand(start, place))
    saved = TaskVector.between(start, model).save(tmp_path / "vector")
    close(saved, by_hand(start, place))
    assert saved.manifest.precision_loss is None


def test_a_model_that_was_loaded_in_another_precision_is_still_that_of_its_start(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "start")
    model = wrapped(loaded("llama", tmp_path / "start").to(torch.bfloat16), target_modules=["q_proj"])
    vector = TaskVector.between(tmp_path / "start", model)
    assert set(vector) - vector.unchanged == {f"model.layers.{index}.self_attn.q_proj.weight" for index in range(2)}


def test_pissa_saved_as_a_difference_to_its_initialisation_is_exact(tmp_path):
    start = tmp_path / "start"
    tiny_model("llama").save_pretrained(start)
    model = wrapped(loaded("llama", start), size=0.0, target_modules=["q_proj"], init_lora_weights="pissa")
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = "pissa"
    noise_on(model, 8)
    model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    expected = {}
    for name, tensor in model.double().merge_and_unload().state_dict().items():
        expected[name] = tensor - read_back(start)[name].double()
    vector = TaskVector.between(start, tmp_path / "adapter")
    for name in vector:
        torch.testing.assert_close(vector[name].double(), expected[name], rtol=1e-5, atol=1e-6)


# --- sums, files and merges ----------------------------------------------------------------------------------------------------------------


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
    with pytest.raises(CorruptFileError, match=r"other bytes in 1: \['model\..*\.(left|right)\.0'\]"):
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
            CorruptFileError, match=r"not those of its manifest; different are 1: \['model.layers.0.self_attn.q_proj.weight.left"
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


def test_an_adapter_directory_stands_for_the_whole_model_it_makes(tmp_path):
    start, place, _ = adapter(tmp_path, modules_to_save=["lm_head"])
    expected, weights = by_hand(start, place), read_back(start)
    whole = open_source(place)
    for name in whole.names:
        assert torch.equal(whole.read(name), (weights[name].double() + expected.get(name, 0)).float()), name
    tuned = dense_tuned(start, tmp_path / "tuned")
    # As START, with dense weights as TUNED.
    vector = TaskVector.between(place, tuned)
    for name in vector:
        assert torch.equal(vector[name], read_back(tuned)[name] - whole.read(name))
    # As ONTO and as TARGET.
    other = TaskVector.between(start, tuned)
    merged = read_back(merge(place, [Term(other, 0.5)], tmp_path / "merged", check_base=False))
    forget(place, Term(TaskVector.between(start, place)), tmp_path / "forgotten")
    for name, weight in weights.items():
        exact = whole.read(name).double() + 0.5 * other[name].double()
        assert torch.equal(merged[name], exact.float())
        torch.testing.assert_close(read_back(tmp_path / "forgotten")[name], weight, rtol=1e-6, atol=1e-6)
    assert (tmp_path / "merged/config.json").is_file()


def test_between_two_adapters_of_one_base_lies_what_the_second_learned(tmp_path):
    start, first, _ = adapter(tmp_path, modules_to_save=["lm_head"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        second = peft.PeftModel.from_pretrained(loaded("llama", start), first, is_trainable=True)
    noise_on(second, 77, 1e-4)
    second.save_pretrained(tmp_path / "second")
    expected = by_hand(start, tmp_path / "second")
    expected = {name: delta - by_hand(start, first)[name] for name, delta in expected.items()}
    for tuned in (tmp_path / "second", second):
        vector = TaskVector.between(first, tuned)
        assert vector.low_rank("model.layers.0.self_attn.q_proj.weight").rank == 6
        for name in vector:
            want = expected.get(name, torch.zeros(vector.shape(name)).double())
            assert (vector[name].double() - want).norm() <= 1e-6 * want.norm(), name
        saved = vector.save(tmp_path / f"vector {tuned is second}")
        want = expected["model.layers.0.self_attn.q_proj.weight"]
        assert (saved["model.layers.0.self_attn.q_proj.weight"].double() - want).norm() <= 1e-6 * want.norm()
        # A tensor is unchanged from adapter to adapter where neither acts on it.
        assert vector.unchanged == set(vector) - set(expected)
    # Counted from the first adapter, not from the base: added to it, the second comes out.
    merged = read_back(merge(first, [Term(TaskVector.between(first, tmp_path / "second"))], tmp_path / "merged"))
    for name in merged:
        torch.testing.assert_close(merged[name], open_source(tmp_path / "second").read(name), rtol=1e-6, atol=1e-7)


def test_between_adapters_of_other_targets_and_ranks_lies_their_difference(tmp_path):
    start, first, _ = adapter(tmp_path, target_modules=["q_proj", "down_proj", "lm_head"])
    _, second, _ = adapter(tmp_path, adapter_name="second", target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"], r=2, seed=50)
    one, two = by_hand(start, first), by_hand(start, second)
    vector = TaskVector.between(first, second)
    for name in vector:
        want = two.get(name, 0) - one.get(name, torch.zeros(vector.shape(name)).double())
        torch.testing.assert_close(vector[name].double(), torch.as_tensor(want), rtol=1e-5, atol=1e-7)
    assert vector.low_rank("lm_head.weight") is None
    assert vector.unchanged == set(vector) - set(one) - set(two)
    same = TaskVector.between(first, first)
    assert not any(same[name].any() for name in same)


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


# --- refusals ------------------------------------------------------------------------------------------------------------------------------


def refused(start, place, error, message):
    with pytest.raises(error, match=message) as caught:
        TaskVector.between(start, place)
    assert "\n" not in str(caught.value).strip()


def change_config(place, **changes):
    path = place / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


OTHER_KINDS = {
    "LoRA bias": (peft.LoraConfig, {"lora_bias": True, "target_modules": ["q_proj"]}, "cannot merge.*base layer has no bias"),
    "aLoRA": (peft.LoraConfig, {"alora_invocation_tokens": [1], "target_modules": ["q_proj"]}, "variant of LoRA that depends on its input"),
    "repeated layers": (peft.LoraConfig, {"layer_replication": [(0, 2), (1, 2)], "target_modules": ["q_proj"]}, "layer_replication"),
    "RoAd": (peft.RoadConfig, {"target_modules": ["q_proj"], "group_size": 4}, "type ROAD, which has not been compared"),
    "prompt tuning": (peft.PromptTuningConfig, {"num_virtual_tokens": 2, "task_type": "CAUSAL_LM"}, "PROMPT_TUNING: it changes no weight"),
    "prefix tuning": (peft.PrefixTuningConfig, {"num_virtual_tokens": 2, "task_type": "CAUSAL_LM"}, "PREFIX_TUNING: it changes no weight"),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_adapters_that_cannot_be_merged_are_refused(tmp_path, kind):
    make, options, message = OTHER_KINDS[kind]
    start, place, model = adapter(tmp_path, config=make, **options) if "target_modules" in options else prompted(tmp_path, make, options)
    refused(start, place, SourceError, message)
    refused(start, model, LataError, message)


def prompted(directory, make, options):
    tiny_model("llama").save_pretrained(directory / "start")
    model = peft.get_peft_model(loaded("llama", directory / "start"), make(**options))
    model.save_pretrained(directory / "adapter")
    return directory / "start", directory / "adapter", model


def test_adapters_on_fused_experts_are_refused(tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path / "start")
    model = wrapped(loaded("mixtral", tmp_path / "start"), target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
    model.save_pretrained(tmp_path / "adapter")
    refused(tmp_path / "start", tmp_path / "adapter", SourceError, "ParamWrapper")
    refused(tmp_path / "start", model, LataError, "ParamWrapper")


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_initialisations_that_change_the_base_are_refused_where_what_they_started_with_is_lost(tmp_path, init):
    start, place, model = adapter(tmp_path, init_lora_weights=init)
    refused(start, place, SourceError, f"initialised by {init}.*path_initial_model_for_weight_conversion")
    refused(start, model, BaseMismatchError, "changes the base weights.*path_initial_model_for_weight_conversion")


@pytest.mark.parametrize("init", ["corda", "lora_ga", "loftq"])
def test_other_initialisations_of_that_kind_are_refused_by_their_config(tmp_path, init):
    start, place, _ = adapter(tmp_path)
    change_config(place, init_lora_weights=init)
    refused(start, place, SourceError, f"initialised by {init}")


def test_merged_adapters_are_refused(tmp_path):
    start, _, model = adapter(tmp_path)
    model.merge_adapter()
    refused(start, model, LataError, "unmerge_adapter")


def test_a_base_weight_that_is_trained_as_well_is_refused(tmp_path):
    start, _, model = adapter(tmp_path)
    model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.requires_grad_(True)
    refused(start, model, LataError, "trains the weight under it")


def test_adapters_without_a_peft_model_around_them_are_refused(tmp_path):
    start, _, _ = adapter(tmp_path)
    model = loaded("llama", start)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    refused(start, model, LataError, "get_peft_model")
    mixed = peft.get_peft_model(loaded("llama", start), peft.LoraConfig(r=2, target_modules=["q_proj"]), mixed=True)
    refused(start, mixed, LataError, "get_peft_model")


def test_a_wrapped_model_is_no_start(tmp_path):
    start, _, model = adapter(tmp_path)
    refused(model, start, SourceError, "give it as TUNED")
    # Peft changes the model it wraps.
    refused(model.get_base_model(), start, LataError, "get_peft_model")


def test_an_adapter_on_other_weights_than_the_start_is_refused(tmp_path):
    start, place, model = adapter(tmp_path, target_modules=["q_proj", "embed_tokens"])
    tiny_model("llama", seed=9).save_pretrained(tmp_path / "elsewhere")
    refused(tmp_path / "elsewhere", place, BaseMismatchError, rf"trained on {start}.*Give {start} as START")
    refused(tmp_path / "elsewhere", model, BaseMismatchError, "carries other values of")
    # Without the name of its base, the embedding that is stored beside its factors tells.
    change_config(place, base_model_name_or_path=None)
    refused(tmp_path / "elsewhere", place, BaseMismatchError, r"carries other values of 1: \['model.embed_tokens.weight'\]")


def test_a_copy_of_the_start_is_as_good_as_the_start(tmp_path):
    start, place, _ = adapter(tmp_path)
    loaded("llama", start).save_pretrained(tmp_path / "copy")
    close(TaskVector.between(tmp_path / "copy", place), by_hand(start, place))
    change_config(place, base_model_name_or_path="someone/else")
    close(TaskVector.between(start, place), by_hand(start, place))


def test_an_adapter_of_another_architecture_is_refused(tmp_path):
    _, place, model = adapter(tmp_path)
    tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")
    change_config(place, base_model_name_or_path=None)
    refused(tmp_path / "gpt2", place, LayoutMismatchError, "cannot be put onto")
    refused(tmp_path / "gpt2", model, LayoutMismatchError, "adapts tensors that .* does not hold")
    llama().save_pretrained(tmp_path / "narrow")
    refused(tmp_path / "narrow", place, LayoutMismatchError, "same shapes|other shapes")
    refused(tmp_path / "narrow", model, LayoutMismatchError, "same shapes")


def test_a_start_of_no_known_architecture_is_refused(tmp_path):
    start, place, _ = adapter(tmp_path)
    change_config(place, base_model_name_or_path=None)
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((start / "model.safetensors").read_bytes())
    refused(alone, place, SourceError, "architecture that transformers knows")
    config = json.loads((start / "config.json").read_text())
    (start / "config.json").write_text(json.dumps({**config, "architectures": ["MadeUp"]}))
    refused(start, place, SourceError, "architecture that transformers knows")


@pytest.mark.parametrize("key", ["lora_A", "lora_B", "lm_head"])
def test_an_adapter_file_that_lacks_tensors_is_refused(tmp_path, key):
    start, place, _ = adapter(tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head"])
    held = load_file(place / WEIGHTS)
    gone = next(name for name in held if key in name)
    save_file({name: tensor for name, tensor in held.items() if name != gone}, place / WEIGHTS)
    refused(start, place, CorruptFileError, f"lacks tensors that its config asks for, 1: .*{key}")


def test_an_adapter_file_without_its_trained_biases_is_refused(tmp_path):
    start, place, _ = adapter(tmp_path, "bert", target_modules=["query"], bias="lora_only")
    held = load_file(place / WEIGHTS)
    save_file({name: tensor for name, tensor in held.items() if not name.endswith("bias")}, place / WEIGHTS)
    refused(start, place, CorruptFileError, r"lacks tensors that its config asks for, 2: .*bias")


def test_an_adapter_file_with_foreign_tensors_is_refused(tmp_path):
    start, place, _ = adapter(tmp_path)
    held = load_file(place / WEIGHTS)
    save_file({**held, "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.zeros(3, 16)}, place / WEIGHTS)
    refused(start, place, LayoutMismatchError, r"that the model of .* does not have, 1: \['base_model.model.model.layers.7")
    save_file({**held, next(iter(held)): torch.zeros(2, 2)}, place / WEIGHTS)
    refused(start, place, LayoutMismatchError, "other shapes")


def test_an_adapter_file_that_is_cut_is_refused(tmp_path):
    start, place, _ = adapter(tmp_path)
    content = (place / WEIGHTS).read_bytes()
    (place / WEIGHTS).write_bytes(content[:-10])
    refused(start, place, CorruptFileError, "no readable safetensors")


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "no JSON"), ("[1]", "must hold a JSON object, it holds a list"), ("\xff", "no JSON"), ("", "no JSON")],
)
def test_a_config_that_is_no_json_object_is_refused(tmp_path, text, message):
    start, place, _ = adapter(tmp_path)
    (place / CONFIG).write_bytes(text.encode("latin-1"))
    refused(start, place, CorruptFileError, message)
    with pytest.raises(CorruptFileError, match=message):
        open_source(place)


@pytest.mark.parametrize(
    "change",
    [{"r": "three"}, {"r": -1}, {"target_modules": "("}, {"rank_pattern": [1]}, {"lora_alpha": None}],
    ids=str,
)
def test_a_config_that_peft_cannot_use_is_refused(tmp_path, change):
    start, place, _ = adapter(tmp_path)
    change_config(place, **change)
    refused(start, place, LayoutMismatchError, "cannot be put onto|no config that peft can use")


def test_a_config_without_a_kind_is_refused(tmp_path):
    start, place, _ = adapter(tmp_path)
    change_config(place, peft_type=None)
    refused(start, place, SourceError, "of the type None, which this release of peft does not know")


def test_a_base_that_is_no_text_or_itself_an_adapter_is_refused(tmp_path):
    start, place, _ = adapter(tmp_path)
    change_config(place, base_model_name_or_path=5)
    refused(start, place, CorruptFileError, "must name its base model by a text, it holds 5")
    change_config(place, base_model_name_or_path=str(place))
    with pytest.raises(SourceError, match="names another adapter as its base"):
        open_source(place)
    change_config(place, base_model_name_or_path=None)
    with pytest.raises(SourceError, match="names no base_model_name_or_path"):
        open_source(place)


def test_the_hub_is_not_asked_about_an_adapter_on_local_weights(tmp_path, monkeypatch):
    start, place, _ = adapter(tmp_path)
    change_config(place, base_model_name_or_path="someone/else")

    def refuse(*_):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(peft.utils.save_and_load, "check_file_exists_on_hf_hub", refuse)
    close(TaskVector.between(start, place), by_hand(start, place))


def test_the_checkpoint_of_a_wrapped_model_is_refused(tmp_path):
    start, _, model = adapter(tmp_path)
    path = write_checkpoint(tmp_path / "last.ckpt", model.state_dict(), prefix="model.")
    refused(start, path, SourceError, "wrapped by peft.*save_pretrained")
