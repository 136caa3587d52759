"""The monitor in loops of plain torch: against whole float64 vectors, resumed, cast, unfrozen and saved."""

import copy
import json
import math

import peft
import pytest
import torch
from lightning.fabric import Fabric
from small_modules import Stack
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lata_lightning import LataError, TaskVector, TaskVectorMonitor, align
from lata_lightning.errors import LayoutMismatchError, OutputError
from lata_lightning.report.contents import build
from lata_lightning.vectors.artefact import verify

# peft asks a model of transformers for gradient checkpointing under an older name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 32,
    "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def moved(model, seed, size=0.02):
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)
    return other


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Base, instruct, their instruction vector, and the vectors of two experts of instruct."""
    directory = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES))
    instruct = moved(base, 1)
    for name, model in {"base": base, "instruct": instruct, "math-model": moved(instruct, 2), "code-model": moved(instruct, 3)}.items():
        model.save_pretrained(directory / name)
    TaskVector.between(directory / "base", directory / "instruct", kind="instruction").save(directory / "instruction")
    for name in ("math", "code"):
        TaskVector.between(directory / "instruct", directory / f"{name}-model").save(directory / name)
    return directory


def load(models, name="instruct"):
    return LlamaForCausalLM.from_pretrained(models / name)


def optimizer_of(model):
    return torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.01)


def train(model, steps, first=0, optimizer=None):
    """Steps of training in place, on the batches from number ``first`` on."""
    optimizer = optimizer or optimizer_of(model)
    for step in range(first, first + steps):
        tokens = torch.randint(3, 32, (2, 8), generator=torch.Generator().manual_seed(step))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def flat(tensors, prefix=""):
    return torch.cat([tensors[name].detach().double().flatten() for name in sorted(tensors) if name.startswith(prefix)])


def minus(one, other):
    other = dict(other.named_parameters())
    return {name: parameter.detach().double() - other[name].detach().double() for name, parameter in one.named_parameters()}


def cosine(one, other, prefix=""):
    return torch.nn.functional.cosine_similarity(flat(one, prefix), flat(other, prefix), dim=0).item()


# --- numbers -------------------------------------------------------------------------------------------------------------------------------


def test_alignment_and_norms_are_those_of_whole_float64_vectors(models):
    model = load(models)
    monitor = TaskVectorMonitor(model, models / "instruction")
    train(model, 3)
    alignment = monitor.measure(3)
    task, instruction = minus(model, load(models)), minus(load(models), load(models, "base"))
    complex_vector = {name: task[name] + instruction[name] for name in task}
    for layer, value in alignment.values.items():
        assert value == pytest.approx(cosine(complex_vector, instruction, f"{layer}."), abs=1e-9)
        assert alignment.layers[layer].task_norm == pytest.approx(flat(task, f"{layer}.").norm().item(), rel=1e-9)
    (measured,) = monitor.history
    assert (measured.step, measured.epoch, measured.alignment) == (3, None, alignment)
    assert measured.figures["task_norm"] == pytest.approx(flat(task).norm().item(), rel=1e-9)


@pytest.mark.parametrize("start", ["instruct", "base"])
def test_cosines_with_other_vectors_are_those_of_whole_float64_vectors(models, tmp_path, start):
    model = load(models, start)
    others = {name: moved(load(models, start), seed) for name, seed in (("math", 2), ("code.v2", 3))}
    for name, other in others.items():
        TaskVector.between(load(models, start), other, start_kind=start).save(tmp_path / name)
    monitor = TaskVectorMonitor(model, models / "instruction", start=start, compare_with={name: tmp_path / name for name in others})
    train(model, 3)
    alignment = monitor.measure(3, epoch=0)
    own = minus(model, load(models, start))
    (measured,) = monitor.history
    for name, other in others.items():
        stored = minus(other, load(models, start))
        assert measured.figures[f"cosine/{name}"] == pytest.approx(cosine(own, stored), abs=1e-7)
        assert set(measured.cosines[name]) == set(alignment.layers)
        for layer, value in measured.cosines[name].items():
            assert value == pytest.approx(cosine(own, stored, f"{layer}."), abs=1e-7)


def test_a_vector_compared_with_itself_has_the_cosine_one_and_with_its_negative_minus_one(models):
    model = load(models)
    math_vector = TaskVector.open(models / "math")
    monitor = TaskVectorMonitor(model, compare_with={"math": math_vector})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(math_vector[name], alpha=0.5)
    monitor.measure(1)
    assert monitor.history[-1].figures["cosine/math"] == pytest.approx(1.0, abs=1e-5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.sub_(math_vector[name])
    monitor.measure(2)
    assert monitor.history[-1].figures["cosine/math"] == pytest.approx(-1.0, abs=1e-5)


def test_adapters_are_compared_in_their_factors(models, tmp_path):
    torch.manual_seed(1)
    model = peft.get_peft_model(load(models), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    # A LoRA vector is stored as factors, too.
    other = peft.get_peft_model(load(models), peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
    other.save_pretrained(tmp_path / "adapter")
    TaskVector.between(models / "instruct", tmp_path / "adapter").save(tmp_path / "lora")
    monitor = TaskVectorMonitor(model, models / "instruction", compare_with={"lora": tmp_path / "lora", "math": models / "math"})
    train(model, 4)
    monitor.measure(4)
    own = minus(copy.deepcopy(model).double().merge_and_unload(), load(models))
    for name, stored in (
        ("lora", minus(other.double().merge_and_unload(), load(models))),
        ("math", minus(load(models, "math-model"), load(models))),
    ):
        assert monitor.history[-1].figures[f"cosine/{name}"] == pytest.approx(cosine(own, stored), abs=1e-6)


def test_frozen_layers_have_no_cosine_and_count_in_the_length_of_the_other_vector(models):
    model = load(models)
    model.model.layers[0].requires_grad_(False)
    monitor = TaskVectorMonitor(model, compare_with={"math": models / "math"})
    train(model, 2)
    monitor.measure(2)
    measured = monitor.history[-1]
    own, stored = minus(model, load(models)), minus(load(models, "math-model"), load(models))
    assert set(measured.cosines["math"]) == {"model.layers.1", "model.layers.2"}
    assert measured.figures["cosine/math"] == pytest.approx(cosine(own, stored), abs=1e-7)


def test_training_is_bit_identical_with_and_without_a_monitor(models):
    plain, watched = load(models), load(models)
    train(plain, 4)
    monitor, optimizer = TaskVectorMonitor(watched, models / "instruction", compare_with={"math": models / "math"}), optimizer_of(watched)
    for step in range(4):
        train(watched, 1, step, optimizer)
        monitor.measure(step + 1)
    assert all(torch.equal(one, other) for one, other in zip(plain.parameters(), watched.parameters(), strict=True))


# --- what it saves -------------------------------------------------------------------------------------------------------------------------


def test_the_saved_vector_is_the_difference_with_the_alignment_that_align_measures(models, tmp_path):
    model = load(models)
    monitor = TaskVectorMonitor(model, models / "instruction", weighting="linear")
    train(model, 3)
    monitor.measure(3, epoch=1)
    monitor.save(tmp_path / "vector")
    vector = TaskVector.open(tmp_path / "vector")
    start = dict(load(models).named_parameters())
    assert all(torch.equal(vector[name], parameter.detach() - start[name].detach()) for name, parameter in model.named_parameters())
    assert (vector.manifest.step, vector.manifest.epoch, vector.manifest.weighting) == (3, 1, "linear")
    assert vector.manifest.alignment.values == pytest.approx(align(vector, TaskVector.open(models / "instruction")).values, rel=1e-12)
    verify(tmp_path / "vector")
    with pytest.raises(OutputError, match="exists"):
        monitor.save(tmp_path / "vector")


def test_weights_that_moved_since_the_last_measurement_are_saved_under_no_step_but_the_one_given(models, tmp_path):
    model = load(models)
    monitor = TaskVectorMonitor(model, models / "instruction")
    train(model, 1)
    monitor.measure(1)
    train(model, 1, 1)
    monitor.save(tmp_path / "unknown")
    monitor.save(tmp_path / "known", step=2)
    assert TaskVector.open(tmp_path / "unknown").manifest.step is None
    assert TaskVector.open(tmp_path / "known").manifest.step == 2
    assert [measured.step for measured in monitor.history] == [1]


def test_vector_and_history_in_one_directory_make_a_report(models, tmp_path):
    model = load(models)
    monitor = TaskVectorMonitor(model, models / "instruction", compare_with={"math": models / "math"})
    for step in (1, 2):
        train(model, 1, step)
        monitor.measure(step, epoch=0)
    monitor.save(tmp_path / "run/task_vector")
    monitor.save_history(tmp_path / "run/history.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "run/history.jsonl").read_text().splitlines()]
    assert [(row["step"], row["epoch"], set(row["cosines"])) for row in rows] == [(1, 0, {"math"}), (2, 0, {"math"})]
    assert build([tmp_path / "run"]).cards[0].kind.startswith("run, 2 measurements")


# --- resume --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True], ids=["whole model", "adapters"])
@pytest.mark.parametrize("restored_first", [False, True], ids=["then restored", "restored first"])
@pytest.mark.parametrize("base_weights", ["auto", "memory", "spill"])
def test_a_resumed_loop_ends_with_the_history_and_vector_of_the_uninterrupted_one(models, tmp_path, lora, restored_first, base_weights):
    def build_model():
        torch.manual_seed(5)
        model = load(models)
        return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])) if lora else model

    def watch(model, spill_to):
        options = {"spill_to": spill_to} if base_weights == "spill" else {}
        return TaskVectorMonitor(
            model, models / "instruction", compare_with={"code": models / "code"}, base_weights=base_weights, **options
        )

    def go_on(model, monitor, optimizer, steps):
        for step in steps:
            train(model, 1, step, optimizer)
            monitor.measure(step + 1)

    whole = build_model()
    monitor, optimizer = watch(whole, tmp_path / "whole"), optimizer_of(whole)
    go_on(whole, monitor, optimizer, range(4))
    monitor.save(tmp_path / "expected")

    first = build_model()
    interrupted, optimizer = watch(first, tmp_path / "parts"), optimizer_of(first)
    go_on(first, interrupted, optimizer, range(2))
    state = {"model": first.state_dict(), "optimizer": optimizer.state_dict(), "monitor": interrupted.state_dict()}
    torch.save(state, tmp_path / "checkpoint.pt")
    # Lost, as the process ends after it.
    go_on(first, interrupted, optimizer, range(2, 3))

    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    second = build_model()
    resumed, optimizer = watch(second, tmp_path / "parts"), optimizer_of(second)
    if restored_first:
        second.load_state_dict(state["model"])
    resumed.load_state_dict(state["monitor"])
    second.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    go_on(second, resumed, optimizer, range(2, 4))
    resumed.save(tmp_path / "vector")
    assert resumed.history == monitor.history
    one, other = TaskVector.open(tmp_path / "vector"), TaskVector.open(tmp_path / "expected")
    assert all(torch.equal(one[name], other[name]) for name in other)
    resumed.close()
    assert not (tmp_path / "parts/start_weights").exists()


def test_a_monitor_made_after_the_checkpoint_was_restored_is_refused_and_base_weights_mends_it(models, tmp_path):
    model = load(models)
    monitor = TaskVectorMonitor(model, models / "instruction")
    train(model, 2)
    monitor.measure(2)
    state = monitor.state_dict()
    restored = load(models)
    restored.load_state_dict(model.state_dict())
    with pytest.raises(LataError, match=r"cannot be had any more.*base_weights="):
        TaskVectorMonitor(restored, models / "instruction").load_state_dict(state)
    mended = TaskVectorMonitor(restored, models / "instruction", base_weights=str(models / "instruct"))
    mended.load_state_dict(state)
    assert mended.measure(2) == monitor.alignment


def test_start_weights_of_another_run_are_in_the_way_until_its_state_is_loaded(models, tmp_path):
    model = load(models)
    first = TaskVectorMonitor(model, base_weights="spill", spill_to=tmp_path)
    state = first.state_dict()
    second = TaskVectorMonitor(load(models), base_weights="spill", spill_to=tmp_path)
    with pytest.raises(LataError, match="give its state to load_state_dict"):
        second.measure(1)
    second.load_state_dict(state)
    second.measure(1)


def test_a_state_is_plain_types_and_one_of_a_later_version_is_refused(models):
    monitor = TaskVectorMonitor(load(models), models / "instruction")
    monitor.measure(0)
    state = monitor.state_dict()
    assert json.loads(json.dumps(state)) == state
    with pytest.raises(LataError, match="version 2, this release reads up to 1"):
        monitor.load_state_dict({**state, "version": 2})


# --- what it refuses -----------------------------------------------------------------------------------------------------------------------


def test_layers_that_were_unfrozen_and_trained_unseen_are_refused_and_seen_ones_measured(models):
    results = []
    for seen in (False, True):
        model = load(models)
        model.model.layers[1].requires_grad_(False)
        monitor = TaskVectorMonitor(model, models / "instruction")
        train(model, 1)
        model.model.layers[1].requires_grad_(True)
        if seen:
            monitor.capture_unfrozen()
        train(model, 1, 1)
        results.append((model, monitor))
    with pytest.raises(LataError, match=r"unfrozen, and may have been trained.*model.layers.1.*capture_unfrozen\(\)"):
        results[0][1].measure(2)
    model, monitor = results[1]
    task = minus(model, load(models))
    assert monitor.measure(2).layers["model.layers.1"].task_norm == pytest.approx(flat(task, "model.layers.1.").norm().item(), rel=1e-9)


@pytest.mark.parametrize(("before", "after"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_model_that_is_cast_afterwards_is_refused(models, before, after):
    model = load(models).to(before)
    monitor = TaskVectorMonitor(model)
    model.to(after)
    with pytest.raises(LataError, match=r"cast to another precision.*then make the monitor"):
        monitor.measure(1)


def test_a_model_in_half_precision_starts_from_its_rounded_weights(models):
    monitor = TaskVectorMonitor(load(models).bfloat16())
    assert monitor.measure(1).layers["model.layers.0"].task_norm == 0.0


def test_a_model_whose_adapters_were_merged_is_refused(models):
    model = peft.get_peft_model(load(models), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    holder = nn.ModuleDict({"model": model})
    monitor = TaskVectorMonitor(holder)
    model.base_model.model.lm_head = nn.Identity()
    with pytest.raises(LataError, match=r"other parameters than when.*lm_head.weight"):
        monitor.measure(1)


def test_a_model_without_weights_steps_that_go_back_and_a_missing_directory_are_refused(models):
    with torch.device("meta"):
        empty = LlamaForCausalLM(LlamaConfig(**SIZES))
    with pytest.raises(LataError, match="no weights"):
        TaskVectorMonitor(empty)
    monitor = TaskVectorMonitor(load(models))
    monitor.measure(5)
    monitor.measure(5)
    assert len(monitor.history) == 1
    with pytest.raises(LataError, match="steps must not go back: step 4 .* after step 5"):
        monitor.measure(4)
    with pytest.raises(LataError, match="spill_to="):
        TaskVectorMonitor(load(models), base_weights="spill")


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        ("base-start", r"started from base, and this fine-tune starts from instruct"),
        ("zero", r"zero in every tensor"),
        ("narrow", r"must fit the model in training"),
    ],
)
def test_vectors_that_cannot_be_compared_are_refused_with_their_name(models, tmp_path, vector, message):
    if vector == "base-start":
        TaskVector.between(models / "base", models / "math-model", start_kind="base").save(tmp_path / vector)
    elif vector == "zero":
        TaskVector.between(models / "instruct", models / "instruct").save(tmp_path / vector)
    else:
        narrow = LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": 2}))
        TaskVector.between(narrow, moved(narrow, 1)).save(tmp_path / vector)
    with pytest.raises((LataError, LayoutMismatchError), match=message) as raised:
        TaskVectorMonitor(load(models), compare_with={"other": tmp_path / vector})
    assert str(tmp_path / vector) in str(raised.value)


@pytest.mark.parametrize("name", ["", "a/b", "a b"])
def test_names_that_cannot_be_part_of_a_key_are_refused(models, name):
    with pytest.raises(LataError, match="letters, digits"):
        TaskVectorMonitor(load(models), compare_with={name: models / "math"})


# torch.compile imports a part of torch that uses an older part of it.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("wrapper", ["DDP", "Fabric", "torch.compile"])
def test_wrappers_leave_the_names_of_a_module_of_ones_own(tmp_path, wrapper):
    plain = Stack()
    if wrapper == "DDP":
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
        wrapped = nn.parallel.DistributedDataParallel(plain)
    elif wrapper == "Fabric":
        wrapped = Fabric(accelerator="cpu", devices=1).setup_module(plain)
    else:
        wrapped = torch.compile(plain)
    try:
        monitor = TaskVectorMonitor(wrapped)
        with torch.no_grad():
            plain.layers[1].attention.weight.add_(1)
        # 16 entries, each 1 further.
        assert monitor.measure(1).layers["layers.1"].task_norm == pytest.approx(4.0, rel=1e-6)
        assert set(monitor.tracker.live.names) == {name for name, tensor in plain.state_dict().items() if tensor.is_floating_point()}
    finally:
        if wrapper == "DDP":
            torch.distributed.destroy_process_group()


def test_a_module_of_ones_own_with_buffers_is_measured_without_them():
    module = Stack()
    before = {name: parameter.detach().double().clone() for name, parameter in module.named_parameters()}
    monitor = TaskVectorMonitor(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
    monitor.measure(1)
    expected = math.sqrt(
        sum((parameter.detach().double() - before[name]).square().sum().item() for name, parameter in module.named_parameters())
    )
    assert monitor.history[-1].figures == {"task_norm": pytest.approx(expected, rel=1e-9)}
