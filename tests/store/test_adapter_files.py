"""Which files are an adapter, and under which names its tensors are read; peft itself is the reference."""

import copy
import re
import shutil
import warnings

import peft
import pytest
import torch
import transformers
from adapter_models import WEIGHTS, adapter, by_hand, close, refused, wrapped
from architectures import loaded
from safetensors.torch import load_file, save_file
from tiny_models import read_back, same_bits

from lata_lightning import TaskVector
from lata_lightning.cli.main import main
from lata_lightning.errors import CorruptFileError, LayoutMismatchError, SourceError
from lata_lightning.store.opening import open_source

# peft asks a model for it, and transformers gives it another name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 160,
}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}


def gemma3():
    tokens = {"mm_tokens_per_image": 4, "image_token_index": 150, "boi_token_index": 151, "eoi_token_index": 152}
    config = transformers.Gemma3Config(text_config={**TEXT, "head_dim": 8, "sliding_window": 8}, vision_config=VISION, **tokens)
    return transformers.Gemma3ForConditionalGeneration(config)


def llava():
    config = transformers.LlavaConfig(
        text_config={**TEXT, "model_type": "llama"}, vision_config={**VISION, "model_type": "clip_vision_model"}, image_token_index=150
    )
    return transformers.LlavaForConditionalGeneration(config)


def paligemma():
    config = transformers.PaliGemmaConfig(
        text_config={**TEXT, "model_type": "gemma", "head_dim": 8}, vision_config={**VISION, "projection_dim": 16}, image_token_index=150
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


@pytest.mark.parametrize("build", [gemma3, llava, paligemma])
def test_an_adapter_with_names_of_an_older_transformers_is_what_peft_loads(tmp_path, build):
    torch.manual_seed(0)
    built = build()
    built.save_pretrained(tmp_path / "start")
    model = wrapped(type(built).from_pretrained(tmp_path / "start"), target_modules=r".*language_model.*\.(q_proj|v_proj)")
    model.save_pretrained(tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    held = load_file(tmp_path / "new" / WEIGHTS)
    older = {key.replace("model.model.language_model.layers", "model.language_model.model.layers"): tensor for key, tensor in held.items()}
    assert set(older) != set(held)
    save_file(older, tmp_path / "old" / WEIGHTS)
    by_peft = peft.PeftModel.from_pretrained(type(built).from_pretrained(tmp_path / "start"), tmp_path / "old")
    by_peft.double().merge_and_unload().save_pretrained(tmp_path / "merged")
    start, merged = read_back(tmp_path / "start"), read_back(tmp_path / "merged")
    changed = [name for name in start if not torch.equal(start[name].double(), merged[name].double())]
    assert len(changed) == 4
    vectors = [TaskVector.between(tmp_path / "start", tmp_path / place) for place in ("old", "new")]
    for vector in vectors:
        assert set(vector) - vector.unchanged == set(changed)
        for name in changed:
            torch.testing.assert_close(vector[name].double(), merged[name].double() - start[name].double(), rtol=1e-6, atol=1e-12)


def test_names_that_peft_does_not_load_either_are_refused(tmp_path):
    start, place, _ = adapter(tmp_path)
    held = load_file(place / WEIGHTS)
    save_file({key.replace("model.layers", "decoder.blocks"): tensor for key, tensor in held.items()}, place / WEIGHTS)
    refused(start, place, CorruptFileError, "lacks tensors that its config asks for")


def test_an_adapter_in_a_folder_of_its_name_is_found(tmp_path):
    start, place, _ = adapter(tmp_path)
    shutil.copytree(place, tmp_path / "outer/math")
    (tmp_path / "outer/README.md").write_text("what peft writes beside it")
    expected = by_hand(start, place)
    for path in (tmp_path / "outer", tmp_path / "outer/math", tmp_path / "outer/math" / WEIGHTS):
        close(TaskVector.between(start, path), expected)
        assert same_bits(
            {name: open_source(path).read(name) for name in read_back(start)}, {n: open_source(place).read(n) for n in read_back(start)}
        )


def test_of_several_adapters_in_folders_one_has_to_be_named(tmp_path):
    start, _, model = adapter(tmp_path, target_modules=["q_proj"], adapter_name="unused")
    for name in ("one", "two"):
        model.add_adapter(name, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "both", selected_adapters=["one", "two"])
    refused(start, tmp_path / "both", SourceError, r"several adapters, 2: \['one', 'two'\]: give one of them, such as .*both/one")
    close(TaskVector.between(start, tmp_path / "both/two"), by_hand(start, tmp_path / "both/two"))
    # Beside the adapter named default, which lies in the directory itself, peft loads no other by that path.
    model.save_pretrained(tmp_path / "all")
    close(TaskVector.between(start, tmp_path / "all"), by_hand(start, tmp_path / "all"))
    close(TaskVector.between(start, tmp_path / "all/one"), by_hand(start, tmp_path / "all/one"))


def test_the_folder_of_an_adapter_beside_whole_weights_is_not_taken_for_them(tmp_path):
    start, place, _ = adapter(tmp_path)
    loaded("llama", start).save_pretrained(tmp_path / "model")
    shutil.copytree(place, tmp_path / "model/adapter")
    vector = TaskVector.between(start, tmp_path / "model")
    assert not any(vector[name].any() for name in vector)


def test_a_pickled_adapter_is_read_without_running_anything(tmp_path, capsys):
    start, place, model = adapter(tmp_path)
    expected = by_hand(start, place)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert not (tmp_path / "pickled" / WEIGHTS).exists()
    close(TaskVector.between(start, tmp_path / "pickled"), expected)
    close(TaskVector.between(start, tmp_path / "pickled/adapter_model.bin"), expected)
    assert main(["inspect", str(tmp_path / "pickled")]) == 0
    assert "peft adapter" in capsys.readouterr().out


def test_a_pickled_adapter_that_would_run_code_runs_none(tmp_path):
    start, place, _ = adapter(tmp_path)

    class Exploit:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    held = load_file(place / WEIGHTS)
    (place / WEIGHTS).unlink()
    torch.save({**held, "more": Exploit()}, place / "adapter_model.bin")
    try:
        vector = TaskVector.between(start, place)
        assert vector["model.layers.0.self_attn.q_proj.weight"].any()
    except (SourceError, LayoutMismatchError):
        pass
    assert not (tmp_path / "ran").exists()


def test_an_adapter_directory_without_weights_is_refused(tmp_path, capsys):
    start, place, _ = adapter(tmp_path)
    (place / WEIGHTS).unlink()
    refused(start, place, SourceError, "holds neither adapter_model.safetensors nor adapter_model.bin")
    assert main(["inspect", str(place)]) == 0
    capsys.readouterr()


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_an_adapter_of_a_classifier_is_read_over_the_classifier_with_its_head(tmp_path, task):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
    kind = transformers.BertForSequenceClassification if task == "SEQ_CLS" else transformers.BertForTokenClassification
    kind(transformers.BertConfig(**sizes, num_labels=3)).save_pretrained(tmp_path / "start")
    model = wrapped(kind.from_pretrained(tmp_path / "start"), target_modules=["query"], task_type=task)
    model.save_pretrained(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = copy.deepcopy(model).double().merge_and_unload().state_dict()
    vector = TaskVector.between(tmp_path / "start", tmp_path / "adapter")
    assert vector["classifier.weight"].any()
    for name, weight in read_back(tmp_path / "start").items():
        torch.testing.assert_close(vector[name].double(), merged[name] - weight.double(), rtol=1e-6, atol=1e-9)


BERT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
LLAMA = {**TEXT, "vocab_size": 40, "pad_token_id": 0}
GPT2 = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 40, "n_positions": 16}
QUERY = {"target_modules": ["query"]}
# Start, class that the adapter was trained on with its arguments, settings of the adapter, and the tensors of its head that are left out.
HEADS = {
    "classifier over a language model": (
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
        (transformers.LlamaForSequenceClassification, {"num_labels": 3}),
        {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"},
        ["^score\\.weight$"],
    ),
    "classifier over a bare model": (
        lambda: transformers.BertModel(transformers.BertConfig(**BERT)),
        (transformers.BertForSequenceClassification, {"num_labels": 5}),
        {**QUERY, "task_type": "SEQ_CLS"},
        ["^classifier\\.bias$", "^classifier\\.weight$"],
    ),
    "tokens over a masked model, no task": (
        lambda: transformers.BertForMaskedLM(transformers.BertConfig(**BERT)),
        (transformers.BertForTokenClassification, {"num_labels": 3}),
        {**QUERY, "modules_to_save": ["classifier"]},
        ["^classifier\\.bias$", "^classifier\\.weight$"],
    ),
    "images": (
        lambda: transformers.ViTModel(transformers.ViTConfig(**VISION), add_pooling_layer=False),
        (transformers.ViTForImageClassification, {"num_labels": 3}),
        {"target_modules": ["q_proj"], "modules_to_save": ["classifier"]},
        ["^classifier\\.bias$", "^classifier\\.weight$"],
    ),
    "features of a model with a head": (
        lambda: transformers.BertForMaskedLM(transformers.BertConfig(**BERT)),
        (transformers.BertModel, {"add_pooling_layer": False}),
        {**QUERY, "task_type": "FEATURE_EXTRACTION"},
        [],
    ),
    "language model over a bare model": (
        lambda: transformers.GPT2Model(transformers.GPT2Config(**GPT2)),
        (transformers.GPT2LMHeadModel, {}),
        {"target_modules": ["c_attn"], "task_type": "CAUSAL_LM"},
        [],
    ),
}


def bare(tensors):
    """Tensors by the name they have in the model without a head."""
    return {re.sub(r"^(bert|vit|transformer|model)\.", "", name): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("kind", HEADS)
def test_an_adapter_is_read_over_a_start_without_its_head(tmp_path, kind, in_memory):
    torch.manual_seed(0)
    build, (trained_on, settings), lora, head = HEADS[kind]
    build().save_pretrained(tmp_path / "start")
    model = wrapped(trained_on.from_pretrained(tmp_path / "start", **settings), **lora)
    model.save_pretrained(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = copy.deepcopy(model).double().merge_and_unload().state_dict()
    vector = TaskVector.between(tmp_path / "start", model if in_memory else tmp_path / "adapter")
    start, tuned = bare(read_back(tmp_path / "start")), bare(merged)
    assert sum(bool(tensor.any()) for tensor in vector.values()) == 2
    assert set(bare(vector)) == set(start)
    for name, tensor in bare(vector).items():
        if name in tuned:
            torch.testing.assert_close(tensor.double(), tuned[name] - start[name].double(), rtol=1e-6, atol=1e-9)
    # A model in memory also shows what it has beside its head that the start has not.
    assert set(vector.manifest.leave_out) >= set(head) if in_memory else list(vector.manifest.leave_out) == head


IMAGE_MODELS = {
    "clip": lambda: transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={**BERT, "eos_token_id": 2, "max_position_embeddings": 16}, vision_config=VISION, projection_dim=8
        )
    ),
    "convnext": lambda: transformers.ConvNextForImageClassification(
        transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
    ),
    "resnet": lambda: transformers.ResNetForImageClassification(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ),
}


@pytest.mark.parametrize(("name", "target"), [("clip", "q_proj"), ("convnext", "pwconv1"), ("resnet", "convolution")])
def test_an_adapter_of_a_model_that_does_not_tell_its_embeddings_is_read(tmp_path, name, target):
    torch.manual_seed(0)
    built = IMAGE_MODELS[name]()
    built.save_pretrained(tmp_path / "start")
    model = wrapped(type(built).from_pretrained(tmp_path / "start"), target_modules=[target])
    model.save_pretrained(tmp_path / "adapter")
    vector = TaskVector.between(tmp_path / "start", tmp_path / "adapter")
    merged, start = copy.deepcopy(model).double().merge_and_unload().state_dict(), read_back(tmp_path / "start")
    changed = {key for key in vector if vector[key].any()}
    assert changed == {key for key in vector if not torch.equal(merged[key], start[key].double())}
    for key in changed:
        torch.testing.assert_close(vector[key].double(), merged[key] - start[key].double(), rtol=1e-6, atol=1e-9)


# peft saves the whole embedding where its size is not that of the config.
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.parametrize("saved_whole", [["embed_tokens", "lm_head"], ["embed_tokens"]])
def test_an_adapter_of_a_model_with_more_tokens_says_to_resize_the_start(tmp_path, saved_whole):
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).save_pretrained(tmp_path / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(44)
    wrapped(model, target_modules=["q_proj"], modules_to_save=saved_whole, task_type="CAUSAL_LM").save_pretrained(tmp_path / "adapter")
    refused(
        tmp_path / "base",
        tmp_path / "adapter",
        LayoutMismatchError,
        r"a model with 44 rows of tokens, and .*base has 40: .*resize_token_embeddings\(44\)",
    )
