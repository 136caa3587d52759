"""Regression on outputs against least squares on inputs stacked one under the other, and whole models that are put together by hand."""

import copy
import itertools
import warnings

import pytest
import torch
import transformers
from linear_models import Chain, changed, tuned, vectors_of
from peft import LoraConfig, get_peft_model
from small_architectures import SMALL, TEXT, build, samples_of
from tiny_models import llama
from torch import nn
from transformers.pytorch_utils import Conv1D

from lata_lightning import TaskVector, Term, merge, regress
from lata_lightning.errors import BaseMismatchError, CorruptFileError, LataError, LayoutMismatchError, WeightingError

GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Model, config and settings; then what follows one after the other: embeddings, the two blocks, and linear layers behind them.
ARCHITECTURES = {
    "llama": (
        "LlamaForCausalLM", "LlamaConfig", {**TEXT, "num_key_value_heads": 1},
        [["model.embed_tokens"], ["model.layers.0"], ["model.layers.1"], ["lm_head"]],
    ),
    # Its embedding is multiplied by a number, and is the head as well.
    "gemma3": (
        "Gemma3ForCausalLM", "Gemma3TextConfig", {**TEXT, "num_key_value_heads": 1, "head_dim": 8},
        [["model.embed_tokens"], ["model.layers.0"], ["model.layers.1"]],
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2, [["transformer.wte", "transformer.wpe"], ["transformer.h.0"], ["transformer.h.1"]]),
    "bert": (
        "BertForMaskedLM", "BertConfig", TEXT,
        [
            [f"bert.embeddings.{name}_embeddings" for name in ("word", "token_type", "position")],
            ["bert.encoder.layer.0"], ["bert.encoder.layer.1"], ["cls.predictions.transform.dense"],
        ],
    ),
    # Its embedding is what the encoder looks up first.
    "t5": (
        "T5ForConditionalGeneration", "T5Config", {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 40},
        [["encoder.embed_tokens"], *([f"{side}.block.{index}"] for side in ("encoder", "decoder") for index in (0, 1))],
    ),
    "vit": (
        "ViTForImageClassification", "ViTConfig", {**SMALL, "image_size": 8, "patch_size": 4}, [["vit.layers.0"], ["vit.layers.1"], ["classifier"]],
    ),
}  # fmt: skip


def inputs_of(model, modules, batches):
    """What modules take in while a model runs, by name: (positions, width), or numbers of rows."""
    found = {name: [] for name in modules}

    def keep(name, masks):
        def hook(module, args):
            if isinstance(module, nn.Embedding) and name in seen:
                # By a decoder, after the encoder has looked up its own in the same embedding.
                return
            seen.add(name)
            flat = args[0].reshape(-1) if isinstance(module, nn.Embedding) else args[0].reshape(-1, args[0].shape[-1])
            # Positions are the same for all rows, and given once, so no mask is as long.
            mask = next((mask for mask in masks if mask.numel() == len(flat)), None)
            found[name].append(flat if mask is None else flat[mask.reshape(-1).bool()])

        return hook

    for batch in batches:
        seen = set()
        masks = [mask for key, mask in batch.items() if key.endswith("attention_mask")]
        handles = [module.register_forward_pre_hook(keep(name, masks)) for name, module in modules.items()]
        with torch.no_grad():
            model(**batch)
        for handle in handles:
            handle.remove()
    return {name: torch.cat(pieces) for name, pieces in found.items()}


def least_squares(inputs, matrices, off_diagonal):
    """The matrix (outputs, inputs) of least squared error: inputs of each task, and one row for each diagonal entry, stacked."""
    rows, aims = [], []
    for entering, matrix in zip(inputs, matrices, strict=True):
        entering, matrix = entering.double() / len(entering) ** 0.5, matrix.double()
        diagonal = ((1 - off_diagonal) * entering.square().sum(0)).sqrt().diag()
        for part in (off_diagonal**0.5 * entering, diagonal):
            rows.append(part)
            aims.append(part @ matrix.T)
    return torch.linalg.lstsq(torch.cat(rows), torch.cat(aims), driver="gelsd").solution.T


def by_use(inputs, matrices):
    """Rows of an embedding, weighted by the share of each row among all that are looked up."""
    shares = [
        torch.bincount(numbers, minlength=len(matrix)).double() / len(numbers) for numbers, matrix in zip(inputs, matrices, strict=True)
    ]
    total = sum(shares)
    weighted = sum(share[:, None] * matrix.double() for share, matrix in zip(shares, matrices, strict=True))
    mean = sum(matrices).double() / len(matrices)
    return torch.where(total[:, None] > 0, weighted / total.clamp(min=1e-300)[:, None], mean)


def reference(start, models, samples, stages, *, in_order, off_diagonal):
    """The regression of whole models, put together stage by stage."""
    own = [dict(model.named_parameters()) for model in models]
    origin = dict(start.named_parameters())
    merged = {name: sum(weights[name] - origin[name] for weights in own).double() / len(own) for name in origin}
    fitted = set()
    for paths in stages:
        modules = [
            name
            for name, module in start.named_modules()
            if isinstance(module, nn.Linear | nn.Embedding | Conv1D) and any(f"{name}.".startswith(f"{path}.") for path in paths)
        ]
        inputs = []
        for weights, batches in zip(own, samples, strict=True):
            model = copy.deepcopy(start)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    # In order, only the block that is fitted is the task's own.
                    merely = in_order and not name.startswith(tuple(f"{path}." for path in paths))
                    parameter.copy_(origin[name] + merged[name].float() if merely else weights[name])
            inputs.append(inputs_of(model, {name: model.get_submodule(name) for name in modules}, batches))
        for name in modules:
            module = start.get_submodule(name)
            # Tied ones have one name.
            weight = next(key for key, parameter in origin.items() if parameter is module.weight)
            if weight in fitted:
                continue
            deltas = [(weights[weight] - origin[weight]).detach() for weights in own]
            entering = [task[name] for task in inputs]
            if isinstance(module, nn.Embedding):
                merged[weight] = by_use(entering, deltas)
            elif isinstance(module, Conv1D):
                merged[weight] = least_squares(entering, [delta.T for delta in deltas], off_diagonal).T
            else:
                merged[weight] = least_squares(entering, deltas, off_diagonal)
            fitted.add(weight)
    return merged, fitted


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_real_architectures_equal_least_squares_on_whole_models(name, in_order, tmp_path):
    start, models, stages = build(ARCHITECTURES[name])
    samples = samples_of(name)
    start.save_pretrained(tmp_path / "start")
    vectors = [TaskVector.between(start, model) for model in models]
    found = regress(vectors, tmp_path / "start", samples, in_order=in_order, ridge=1e-12)
    merge(tmp_path / "start", [Term(found)], tmp_path / "merged")
    merged = dict(type(start).from_pretrained(tmp_path / "merged").named_parameters())
    expected, fitted = reference(start, models, samples, stages, in_order=in_order, off_diagonal=0.9)
    assert len(fitted) >= 10
    for key, parameter in start.named_parameters():
        torch.testing.assert_close(merged[key].double(), parameter.double() + expected[key], rtol=0, atol=1e-6, msg=key)
    assert {key for key in fitted if key in found} <= set(found) - set(found.manifest.derivation.averaged)


def rows(count, width=4, seed=0, length=3):
    return torch.randn(count, length, width, generator=torch.Generator().manual_seed(seed))


def tokens(count, length, seed=0):
    return torch.randint(0, 24, (count, length), generator=torch.Generator().manual_seed(seed))


def of_chain(inputs):
    return [[{"hidden": x}] for x in inputs]


@pytest.fixture
def toy():
    """One linear block, three vectors, and unequal amounts of samples."""
    start = Chain(depth=1)
    return (
        start,
        vectors_of(start, [tuned(start, seed=seed) for seed in (1, 2, 3)]),
        of_chain([rows(2 + 3 * task, seed=task) for task in range(3)]),
    )


@pytest.mark.parametrize("off_diagonal", [0.0, 0.5, 1.0])
def test_the_factor_of_entries_off_the_diagonal_is_that_of_the_least_squares_problem(toy, off_diagonal):
    start, vectors, samples = toy
    found = regress(vectors, start, samples, off_diagonal=off_diagonal, ridge=1e-12)
    inputs = [batches[0]["hidden"].reshape(-1, 4) for batches in samples]
    expected = least_squares(inputs, [vector["blocks.0.weight"] for vector in vectors], off_diagonal)
    torch.testing.assert_close(found["blocks.0.weight"].double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(found["blocks.0.bias"], sum(vector["blocks.0.bias"] for vector in vectors) / 3)


def test_inputs_in_orthogonal_directions_give_each_vector_back_on_its_own():
    start = Chain(depth=1)
    vectors = vectors_of(start, [tuned(start, seed=seed) for seed in (1, 2)])
    axes = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(5))).Q
    inputs = [rows(4, width=2, seed=seed) @ directions.T for seed, directions in enumerate(axes.split(2, dim=1))]
    found = regress(vectors, start, of_chain(inputs), off_diagonal=1.0, ridge=1e-9)["blocks.0.weight"]
    for vector, x in zip(vectors, inputs, strict=True):
        own = vector["blocks.0.weight"]
        torch.testing.assert_close(x @ found.T, x @ own.T, rtol=0, atol=1e-5)
        assert not torch.allclose(found, own, atol=1e-2)


def test_a_number_worked_by_hand():
    # Inputs 1 and 2, so means of squares 1 and 4; vectors 1 and −1: (1 · 1 − 4 · 1) / 5.
    start = Chain(width=1, depth=1)
    weight = start.blocks[0].weight.detach()
    vectors = vectors_of(start, [changed(start, blocks__0__weight=weight + step) for step in (1.0, -1.0)])
    found = regress(vectors, start, of_chain([torch.full((3, 1, 1), 1.0), torch.full((2, 2, 1), 2.0)]), ridge=1e-9)
    assert found["blocks.0.weight"].item() == pytest.approx(-0.6, abs=1e-6)


@pytest.mark.parametrize("in_order", [True, False])
def test_a_single_vector_and_equal_vectors_come_out_as_they_are(in_order):
    start = llama()
    model = tuned(start, size=0.05)
    for count in (1, 3):
        vectors = vectors_of(start, [model] * count)
        found = regress(vectors, start, [[{"input_ids": tokens(2, 5, seed=task)}] for task in range(count)], in_order=in_order)
        for name, tensor in vectors[0].items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-9, msg=name)


def test_a_vector_that_is_longer_by_a_factor_is_merged_into_one_that_is(toy):
    start, vectors, samples = toy
    origin = {name: torch.zeros(vectors[0].shape(name)) for name in vectors[0]}
    doubled = [
        TaskVector.between(origin, {name: 2 * tensor for name, tensor in vector.items()}, layers=r"^blocks\.\d+") for vector in vectors
    ]
    one, other = (regress(found, start, samples) for found in (vectors, doubled))
    for name in one:
        torch.testing.assert_close(other[name], 2 * one[name], rtol=1e-6, atol=1e-7)


def test_directions_that_no_input_has_get_the_mean_of_the_vectors():
    start = Chain(width=2, depth=1)
    vectors = vectors_of(start, [tuned(start, seed=seed) for seed in (1, 2)])
    inputs = [rows(3, width=2, seed=seed) * torch.tensor([1.0, 0.0]) for seed in (1, 2)]
    found = regress(vectors, start, of_chain(inputs))["blocks.0.weight"]
    mean = sum(vector["blocks.0.weight"] for vector in vectors) / 2
    torch.testing.assert_close(found[:, 1], mean[:, 1])
    assert not torch.allclose(found[:, 0], mean[:, 0], atol=1e-3)
    nothing = regress(vectors, start, of_chain([torch.zeros(1, 1, 2)] * 2))
    torch.testing.assert_close(nothing["blocks.0.weight"], mean)


class Branching(nn.Module):
    """Blocks with a branch that runs on demand, one that never runs, and a matrix that is used without a module."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.more, self.never = (nn.Linear(4, 4) for _ in range(3))
            self.plain = nn.Parameter(torch.eye(4))
            self.own = nn.Parameter(torch.eye(4))

        def forward(self, hidden, extra):
            output = nn.functional.linear(self.main(hidden) @ self.plain, weight=self.own)
            return output + self.more(hidden) if extra else output

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Branching.Block() for _ in range(2)])

    def forward(self, hidden, extra=False):
        for block in self.blocks:
            hidden = block(hidden, extra)
        return hidden


def test_matrices_that_no_sample_reaches_are_plain_means_and_named():
    start = Branching()
    vectors = vectors_of(start, [tuned(start, seed=seed) for seed in (1, 2)])
    narrow = rows(4, seed=2) * torch.tensor([1.0, 1.0, 1.0, 0.0])
    found = regress(vectors, start, [[{"hidden": rows(4, seed=1)}], [{"hidden": narrow, "extra": True}]])
    # Reached by the samples of one task, the branch is all that task's; where these do not go either, it is the mean of both.
    own, mean = vectors[1]["blocks.0.more.weight"], sum(vector["blocks.0.more.weight"] for vector in vectors) / 2
    torch.testing.assert_close(found["blocks.0.more.weight"], torch.cat([own[:, :3], mean[:, 3:]], dim=1), rtol=0, atol=1e-5)
    averaged = {f"blocks.{index}.{name}" for index in (0, 1) for name in ("never.weight", "plain")}
    assert set(found.manifest.derivation.averaged) == averaged
    for name in found:
        mean = sum(vector[name] for vector in vectors) / 2
        assert torch.allclose(found[name], mean, atol=1e-6) == (name in averaged or name.endswith("bias")), name


def test_padding_and_the_size_of_batches_change_nothing():
    start = llama()
    vectors = vectors_of(start, [tuned(start, size=0.05, seed=seed) for seed in (1, 2)])
    ids = [tokens(4, 6, seed=seed) for seed in (1, 2)]
    plain = [[{"input_ids": part} for part in task.split(2)] for task in ids]
    mask = torch.cat([torch.ones(4, 6), torch.zeros(4, 3)], dim=1).long()
    padded = [[{"input_ids": torch.cat([task, torch.full((4, 3), 7)], dim=1), "attention_mask": mask}] for task in ids]
    one, other, wrong = (
        regress(vectors, start, samples)
        for samples in (plain, padded, [[{"input_ids": batch["input_ids"]} for batch in task] for task in padded])
    )
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-5, msg=name)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.allclose(one[name], wrong[name], atol=1e-3)
    assert [entry.facts["samples"] for entry in one.manifest.derivation.inputs] == [4, 4]


class Pooled(nn.Module):
    """Classifies by the first position, as BERT's pooler does, and looks positions up once for all rows."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Embedding(3, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
        self.head = nn.Linear(4, 2)

    def forward(self, hidden, attention_mask=None):
        hidden = hidden + self.positions(torch.arange(3))
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden[:, 0])


def test_a_layer_that_takes_one_position_of_each_row_is_fitted_with_padding_too():
    start = Pooled()
    models = [tuned(start, seed=seed) for seed in (1, 2)]
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    samples = [[{"hidden": rows(2, seed=seed), "attention_mask": mask}] for seed in (1, 2)]
    vectors = vectors_of(start, models)
    found = regress(vectors, start, samples, in_order=False, ridge=1e-12)
    inputs = []
    for model, ((batch,),) in zip(models, zip(samples, strict=True), strict=True):
        inputs.append(inputs_of(model, {"head": model.head}, [{"hidden": batch["hidden"]}])["head"])
    expected = least_squares(inputs, [vector["head.weight"] for vector in vectors], 0.9)
    torch.testing.assert_close(found["head.weight"].double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(found["positions.weight"], sum(vector["positions.weight"] for vector in vectors) / 2)


def test_a_block_that_runs_again_is_fitted_to_its_first_run():
    start = transformers.AlbertModel(transformers.AlbertConfig(**TEXT, embedding_size=16)).eval()
    models = [tuned(start, size=0.05, seed=seed) for seed in (1, 2)]
    vectors = vectors_of(start, models)
    samples = samples_of("bert")
    path = "encoder.albert_layer_groups.0.albert_layers.0.attention.query"
    for in_order in (True, False):
        found = regress(vectors, start, samples, in_order=in_order, ridge=1e-12)
        assert all(tensor.isfinite().all() for tensor in found.values())
    inputs = []
    for model, batches in zip(models, samples, strict=True):
        seen = []
        handle = model.get_submodule(path).register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        for batch in batches:
            with torch.no_grad():
                model(**batch)
        handle.remove()
        inputs.append(torch.cat([entering[batch["attention_mask"].bool()] for entering, batch in zip(seen[::2], batches, strict=True)]))
    expected = least_squares(inputs, [vector[f"{path}.weight"] for vector in vectors], 0.9)
    torch.testing.assert_close(found[f"{path}.weight"].double(), expected, rtol=0, atol=1e-6)


def test_a_tied_head_is_fitted_as_the_embedding():
    start = llama(tied=True)
    vectors = vectors_of(start, [tuned(start, size=0.05, seed=seed) for seed in (1, 2)])
    ids = [tokens(2, 5, seed=seed) for seed in (1, 2)]
    found = regress(vectors, start, [[{"input_ids": task}] for task in ids])
    name = "model.embed_tokens.weight"
    expected = by_use([task.reshape(-1) for task in ids], [vector[name] for vector in vectors])
    torch.testing.assert_close(found[name].double(), expected, rtol=0, atol=1e-7)
    assert list(found) == list(vectors[0])


def test_an_embedding_is_fitted_to_what_the_encoder_looks_up_without_its_own_padding():
    start, models, _ = build(ARCHITECTURES["t5"])
    vectors = vectors_of(start, models)
    # As long as what the decoder takes in, but padded elsewhere.
    mask, other = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    ids = [tokens(2, 4, seed=seed) for seed in (1, 2)]
    samples = [
        [{"input_ids": task, "attention_mask": mask, "decoder_input_ids": tokens(2, 4, seed=3), "decoder_attention_mask": other}]
        for task in ids
    ]
    found = regress(vectors, start, samples)
    expected = by_use([task[mask.bool()] for task in ids], [vector["shared.weight"] for vector in vectors])
    torch.testing.assert_close(found["shared.weight"].double(), expected, rtol=0, atol=1e-7)


def test_adapters_are_merged_as_what_they_add(tmp_path):
    start = llama()
    start.save_pretrained(tmp_path / "start")
    for number in (1, 2):
        torch.manual_seed(number)
        settings = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        with warnings.catch_warnings():
            # About transformers, from peft.
            warnings.simplefilter("ignore")
            adapted = get_peft_model(llama(), settings)
            adapted.save_pretrained(tmp_path / f"adapter-{number}")
    held = [TaskVector.between(tmp_path / "start", tmp_path / f"adapter-{number}") for number in (1, 2)]
    assert held[0].low_rank("model.layers.0.self_attn.q_proj.weight") is not None
    zeros = {name: torch.zeros(vector.shape(name)) for vector in held for name in vector}
    dense = [TaskVector.between(zeros, {name: vector[name] for name in vector}) for vector in held]
    samples = [[{"input_ids": tokens(2, 5, seed=task)}] for task in (1, 2)]
    one, other = (regress(vectors, tmp_path / "start", samples) for vectors in (held, dense))
    moved = {f"model.layers.{index}.self_attn.{part}_proj.weight" for index in (0, 1) for part in "qv"}
    assert one.unchanged == set(one) - moved
    assert one.manifest.derivation.averaged == ()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-6)
        assert one[name].any() == (name in moved)
    # What is frozen needs no fit, and behind the last that is fitted nothing runs.
    runs = []
    start.lm_head.register_forward_hook(lambda *_: runs.append(1))
    regress(held, start, samples)
    assert runs == []
    # Frozen tensors take no room in the file.
    assert one.save(tmp_path / "merged").unchanged == one.unchanged


def test_a_bfloat16_start_is_run_in_float32():
    models = [tuned(llama(), size=0.05, seed=seed) for seed in (1, 2)]
    samples = [[{"input_ids": tokens(2, 5, seed=task)}] for task in (1, 2)]
    found = [regress(vectors_of(start, models), start, samples) for start in (llama(dtype=torch.bfloat16), llama().bfloat16().float())]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_the_start_stays_as_it_is_and_dropout_is_off():
    start = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)) for _ in range(2))).train()
    before = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    vectors = vectors_of(start, [tuned(start, seed=seed) for seed in (1, 2)])
    found = [regress(vectors, start, [[{"input": rows(3, seed=seed)}] for seed in (1, 2)]) for _ in range(2)]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert start.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in start.state_dict().items())


def test_experts_that_are_stored_one_by_one_are_plain_means(tmp_path):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**TEXT, num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1)
    start = transformers.MixtralForCausalLM(config).eval()
    start.save_pretrained(tmp_path / "start")
    for number in (1, 2):
        tuned(start, size=0.05, seed=number).save_pretrained(tmp_path / f"tuned-{number}")
    vectors = [TaskVector.between(tmp_path / "start", tmp_path / f"tuned-{number}") for number in (1, 2)]
    found = regress(vectors, tmp_path / "start", samples_of("llama"))
    averaged = set(found.manifest.derivation.averaged)
    assert averaged == {name for name in found if ".experts." in name}
    name = "model.layers.1.block_sparse_moe.gate.weight"
    assert not torch.allclose(found[name], sum(vector[name] for vector in vectors) / 2, atol=1e-3)


@pytest.mark.parametrize(("in_order", "count"), [(True, 4), (False, 2)])
def test_a_block_runs_once_for_each_sample_and_in_order_once_more(in_order, count):
    start = llama()
    vectors = vectors_of(start, [tuned(start, size=0.05, seed=seed) for seed in (1, 2)])
    runs = []
    start.model.layers[0].mlp.register_forward_hook(lambda *_: runs.append(1))
    regress(vectors, start, [[{"input_ids": tokens(2, 5, seed=task)}] for task in (1, 2)], in_order=in_order)
    assert len(runs) == count


def test_every_stage_is_told_once_and_nothing_runs_behind_the_last():
    start = llama()
    vectors = vectors_of(start, [tuned(start, size=0.05, seed=seed) for seed in (1, 2)])
    seen, logits = [], []
    start.lm_head.register_forward_hook(lambda *_: logits.append(1))
    samples = [[{"input_ids": tokens(2, 5, seed=task)}] for task in (1, 2)]
    regress(vectors, start, samples, progress=lambda done, size: seen.append((done, size)))
    sizes = [24 * 8, *[8 * 8 * 2 + 4 * 8 * 2 + 3 * 8 * 16 + 2 * 8] * 2, 24 * 8]
    assert [done for done, _ in seen] == [4 * number for number in itertools.accumulate(sizes)]
    assert {size for _, size in seen} == {4 * sum(sizes)}
    # Once for each task to be fitted, and not once more.
    assert len(logits) == 2


def test_the_manifest_records_how_the_vector_was_made(tmp_path):
    start = llama()
    start.save_pretrained(tmp_path / "start")
    vectors = [
        TaskVector.between(tmp_path / "start", tuned(start, size=0.05, seed=seed)).save(tmp_path / f"vector-{seed}") for seed in (1, 2)
    ]
    samples = [[{"input_ids": tokens(2, 5, seed=task)}] * task for task in (1, 2)]
    found = regress(vectors, tmp_path / "start", samples, off_diagonal=0.8, in_order=False, ridge=1e-5, data=["a.jsonl", "b.jsonl"])
    made = found.save(tmp_path / "merged").manifest.derivation
    assert made == found.manifest.derivation
    assert (made.name, made.averaged) == ("regression", ())
    assert made.settings == {"in_order": False, "off_diagonal": 0.8, "ridge": 1e-5, "prior": "mean"}
    assert [(entry.label, entry.facts) for entry in made.inputs] == [
        (str(tmp_path / "vector-1"), {"samples": 2, "data": "a.jsonl"}),
        (str(tmp_path / "vector-2"), {"samples": 4, "data": "b.jsonl"}),
    ]
    assert [entry.tuned for entry in made.inputs] == [vector.manifest.tuned_identity for vector in vectors]
    assert TaskVector.open(tmp_path / "merged").manifest.start_identity == vectors[0].manifest.start_identity
    card = (tmp_path / "merged/README.md").read_text()
    assert f"| {tmp_path / 'vector-2'} | 4 | b.jsonl |" in card
    assert "in_order no, off_diagonal 0.8, ridge 1e-05, prior mean" in card
    # One that is merged like any other.
    plan = merge(tmp_path / "start", [Term(found, scale=0.5)], tmp_path / "model")
    model = transformers.LlamaForCausalLM.from_pretrained(plan)
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(model.state_dict()[name], start.state_dict()[name] + 0.5 * found[name])


class Turned(Chain):
    """Hidden states as (positions, rows, width)."""

    def forward(self, hidden, attention_mask=None):
        return super().forward(hidden.transpose(0, 1))


def refused(start, error, match, *, models=None, samples=None, **options):
    vectors = vectors_of(start, [tuned(start)] if models is None else models)
    with pytest.raises(error, match=match):
        regress(vectors, start, of_chain([rows(2)] * len(vectors)) if samples is None else samples, **options)


def test_invalid_requests_are_refused():
    start = Chain()
    refused(start, LataError, "got 2 sets for 1 vectors", samples=of_chain([rows(1)] * 2))
    refused(start, LataError, "there are none for", samples=[[]])
    refused(start, LataError, "the ridge must be positive and finite, got 0", ridge=0)
    refused(start, LataError, "the ridge must be positive and finite, got nan", ridge=float("nan"))
    refused(start, LataError, "1e-30 is lost in rounding", ridge=1e-30, off_diagonal=1.0, samples=of_chain([rows(1, length=1)]))
    refused(start, LataError, r"must lie in \[0, 1\], got 1.5", off_diagonal=1.5)
    refused(start, LataError, "one name of data for each vector: got 2 for 1", data=["a", "b"])
    refused(start, LataError, "give at least one vector", models=[])
    refused(nn.Linear(4, 4), WeightingError, "there is no layer to run")
    with pytest.raises(LataError, match="from base started 1"):
        regress([TaskVector.between(start, tuned(start), start_kind="base")], start, of_chain([rows(1)]))
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    refused(
        Turned(),
        LataError,
        r"padding of a batch of shape \(2, 3\) cannot be found",
        samples=[[{"hidden": rows(2), "attention_mask": mask}]],
    )


def test_vectors_of_other_starts_and_layouts_are_refused(tmp_path):
    starts = [llama(seed=seed) for seed in (0, 1)]
    vectors = [TaskVector.between(start, tuned(start)).save(tmp_path / f"vector-{number}") for number, start in enumerate(starts)]
    samples = [[{"input_ids": tokens(2, 5, seed=task)}] for task in (1, 2)]
    with pytest.raises(BaseMismatchError):
        regress(vectors, starts[0], samples)
    assert len(regress(vectors, starts[0], samples, check_base=False)) == len(vectors[0])
    with pytest.raises(LayoutMismatchError, match="must hold the same tensors"):
        regress(vectors[:1], Chain(), samples[:1])


def test_numbers_that_are_not_finite_are_refused():
    start = Chain()
    refused(
        start, CorruptFileError, r"holds NaN or infinite values in 1: \['blocks.1.bias'\]",
        models=[changed(start, blocks__1__bias=torch.full((4,), torch.nan))],
    )  # fmt: skip
    refused(start, CorruptFileError, "NaN or infinite hidden states in blocks.0", samples=of_chain([rows(2) * torch.inf]))
