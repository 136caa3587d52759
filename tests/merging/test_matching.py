"""Merges of models with buffers, heads and prefixes: what is scaled, what is taken over, and what stays."""

import json
import math

import pytest
import torch
import transformers
from safetensors.torch import load_file

from lata_lightning import TaskVector
from lata_lightning.cli.main import main
from lata_lightning.errors import LataError, LayoutMismatchError
from lata_lightning.merging.merge import Term, forget, merge

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def resnet(labels=3):
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=labels)
    return transformers.ResNetForImageClassification(config)


def trained(model, seed):
    """Every parameter moved, and running statistics of other data."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        for name, buffer in model.named_buffers():
            if "running_" in name:
                buffer.mul_(0.01 * (seed + 1)).add_(0.02 * seed)
            elif name.endswith("num_batches_tracked"):
                buffer.add_(100 * (seed + 1))
    return model


@pytest.fixture
def models(tmp_path):
    """A start and two tuned ResNets on disk, and their tensors as safetensors reads them."""
    resnet().save_pretrained(tmp_path / "start")
    for seed in (1, 2):
        trained(resnet(), seed).save_pretrained(tmp_path / f"tuned-{seed}")
    return tmp_path, {label: load_file(tmp_path / label / "model.safetensors") for label in ("start", "tuned-1", "tuned-2")}


def check(found, start, tuned, scale, statistics):
    for name, value in found.items():
        if name.endswith("num_batches_tracked"):
            assert torch.equal(value, start[name])
        elif "running_" in name:
            torch.testing.assert_close(value, statistics(name), rtol=1e-6, atol=1e-7)
        else:
            expected = start[name].double() + scale * sum(side[name].double() - start[name].double() for side in tuned)
            torch.testing.assert_close(value.double(), expected, rtol=0, atol=2e-7)


@pytest.mark.parametrize("scale", [0.5, 3.0])
@pytest.mark.parametrize("saved", [True, False])
def test_running_statistics_are_taken_over_and_never_scaled(models, scale, saved):
    directory, tensors = models
    vector = TaskVector.between(directory / "start", directory / "tuned-1")
    if saved:
        vector = vector.save(directory / "vector")
    found = load_file(merge(directory / "start", [Term(vector, scale)], directory / "out") / "model.safetensors")
    check(found, tensors["start"], [tensors["tuned-1"]], scale, lambda name: tensors["tuned-1"][name])
    assert all(bool((value >= 0).all()) for name, value in found.items() if name.endswith("running_var"))


def test_of_several_vectors_the_statistics_are_the_mean_of_those_that_changed(models):
    directory, tensors = models
    vectors = [TaskVector.between(directory / "start", directory / f"tuned-{seed}") for seed in (1, 2)]
    still = TaskVector.between(directory / "start", directory / "start")
    found = load_file(
        merge(directory / "start", [Term(vector, 0.7) for vector in (*vectors, still)], directory / "out") / "model.safetensors"
    )
    both = [tensors["tuned-1"], tensors["tuned-2"]]
    check(found, tensors["start"], both, 0.7, lambda name: (both[0][name] + both[1][name]) / 2)


def test_forgetting_leaves_the_statistics_of_the_target_alone(models):
    directory, tensors = models
    vector = TaskVector.between(directory / "start", directory / "tuned-1").save(directory / "vector")
    found = load_file(forget(directory / "tuned-1", Term(vector), directory / "out") / "model.safetensors")
    for name, value in found.items():
        expected = tensors["tuned-1" if "running_" in name or "num_batches" in name else "start"][name]
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)


def test_statistics_count_in_no_norm_and_no_alignment(models):
    directory, tensors = models
    vector, along = (TaskVector.between(directory / "start", directory / f"tuned-{seed}", layers=r"stages\.\d+") for seed in (1, 2))
    from lata_lightning.vectors.aligning import align

    measured = align(vector, along, check_base=False)
    names = [name for name in tensors["start"] if "running_" not in name and "num_batches" not in name]
    norms = [stats.task_norm**2 for stats in (*measured.layers.values(), *measured.outside.values())]
    expected = sum((tensors["tuned-1"][name] - tensors["start"][name]).double().square().sum().item() for name in names)
    assert sum(norms) == pytest.approx(expected, rel=1e-9)
    assert vector.layers.statistics == {name for name in tensors["start"] if "running_" in name}


def test_variances_that_would_become_negative_are_refused(models):
    directory, _ = models
    vector = TaskVector.between(directory / "start", directory / "tuned-1").save(directory / "vector")
    other = resnet()
    for name, buffer in other.named_buffers():
        if name.endswith("running_var"):
            buffer.mul_(1e-3)
    other.save_pretrained(directory / "other")
    with pytest.raises(LataError, match=r"running variances must not become negative, as resnet.*running_var would.*--leave-out"):
        merge(directory / "other", [Term(vector)], directory / "out", check_base=False)
    merge(directory / "other", [Term(vector)], directory / "out", check_base=False, leave_out=["running_(mean|var)$"])
    assert not (directory / "vector/out").exists()


class Masked(torch.nn.Module):
    """A causal mask that is a saved buffer, one that is a parameter, and rotary tables."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 3)
        self.register_buffer("mask", torch.full((3, 3), -math.inf).triu(1))
        self.fixed = torch.nn.Parameter(torch.full((3, 3), -math.inf).triu(1), requires_grad=False)
        self.register_buffer("inv_freq", torch.arange(3.0))
        self.register_buffer("position_ids", torch.arange(3))


@pytest.mark.parametrize("kind", ["module", "state dict", "file"])
def test_masks_and_tables_stay_as_they_are(tmp_path, kind):
    torch.manual_seed(0)
    start, tuned = Masked(), Masked()
    if kind != "module":
        start, tuned = start.state_dict(), tuned.state_dict()
    vector = TaskVector.between(start, tuned)
    vector = vector.save(tmp_path / "vector") if kind == "file" else vector
    assert not {"inv_freq", "position_ids"} & set(vector)
    found = load_file(merge(start, [Term(vector, 2.0)], tmp_path / "out") / "model.safetensors")
    before, after = (side.state_dict() if kind == "module" else side for side in (start, tuned))
    torch.testing.assert_close(found["linear.weight"], before["linear.weight"] + 2 * (after["linear.weight"] - before["linear.weight"]))
    assert all(torch.equal(found[name], before[name]) for name in ("mask", "fixed", "inv_freq", "position_ids"))


def vit(labels, seed):
    torch.manual_seed(seed)
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, image_size=16, patch_size=8, num_labels=labels))


@pytest.fixture
def heads(tmp_path):
    """An encoder, a start with a head of 3, and two tuned models with heads of 3 and 5."""
    start = vit(3, 0)
    start.save_pretrained(tmp_path / "start")
    start.base_model.save_pretrained(tmp_path / "encoder")
    for labels in (3, 5):
        model = vit(labels, labels)
        model.base_model.load_state_dict(start.base_model.state_dict())
        generator = torch.Generator().manual_seed(labels)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        model.save_pretrained(tmp_path / f"task{labels}")
    return tmp_path


@pytest.mark.parametrize("onto", ["start", "encoder"])
@pytest.mark.parametrize("saved", [True, False])
def test_encoders_of_tasks_with_other_heads_are_merged_without_them(heads, onto, saved, capsys):
    tasks = [str(heads / "task3"), str(heads / "task5")]
    start, sides = (
        load_file(heads / "start/model.safetensors"),
        [load_file(heads / task / "model.safetensors") for task in ("task3", "task5")],
    )
    if saved:
        for number, task in enumerate(tasks):
            tasks[number] = str(heads / f"vector{number}")
            assert main(["extract", str(heads / "start"), task, "--leave-out", r"^classifier\.", "--output", tasks[number]]) == 0
        assert json.loads((heads / "vector0/task_vector.json").read_text())["leave_out"] == [r"^classifier\."]
    pattern = [] if saved else ["--leave-out", "^classifier"]
    assert main(["merge", str(heads / onto), *tasks, *pattern, "--output", str(heads / "out")]) == 0
    found = load_file(heads / "out/model.safetensors")
    prefix = "vit." if onto == "encoder" else ""
    for name, value in found.items():
        whole = prefix + name
        if name.startswith("classifier"):
            assert torch.equal(value, start[name])
        else:
            expected = start[whole].double() + sum(side[whole].double() - start[whole].double() for side in sides)
            torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-6)
    assert len(found) == len(load_file(heads / onto / "model.safetensors"))


def test_without_the_option_heads_of_other_sizes_are_refused_with_it(heads, capsys):
    assert main(["merge", str(heads / "start"), str(heads / "task3"), str(heads / "task5"), "--output", str(heads / "out")]) == 1
    assert r"--leave-out '^classifier\.'" in capsys.readouterr().err
    assert main(["extract", str(heads / "start"), str(heads / "task5"), "--leave-out", "clasifier", "--output", str(heads / "out")]) == 1
    assert "each pattern of what to leave out must match" in capsys.readouterr().err
    with pytest.raises(LataError, match="must match a tensor name"):
        vector = TaskVector.between(heads / "start", heads / "task3")
        merge(heads / "start", [Term(vector)], heads / "out", leave_out=["^pooler"])


def test_a_vector_without_its_head_is_measured_beside_one_with_it(heads):
    from lata_lightning.vectors.aligning import align

    vector = TaskVector.between(heads / "start", heads / "task3", leave_out=["^classifier"])
    along = TaskVector.between(heads / "encoder", heads / "start", kind="instruction")
    measured = align(vector, TaskVector.between(heads / "start", heads / "task3"), check_base=False)
    assert set(measured.layers) == set(vector.layers.blocks)
    assert all(stats.alignment == pytest.approx(1) for stats in measured.layers.values())
    # The other vector has the names of a bare model.
    assert set(align(vector, along, check_base=False).layers) == set(vector.layers.blocks)
    with pytest.raises(LayoutMismatchError, match="on one side only are 2"):
        align(TaskVector.between(heads / "start", heads / "task3"), vector, check_base=False)


def test_a_weighted_vector_of_a_model_with_a_head_fits_the_bare_model(heads):
    vector = TaskVector.between(heads / "start", heads / "task3", leave_out=["^classifier"])
    weighted = vector.with_coefficients({block: float(number) for number, block in enumerate(vector.layers.blocks)}, outside=0.5)
    found = load_file(merge(heads / "encoder", [Term(weighted, 2.0)], heads / "out") / "model.safetensors")
    start, tuned = (load_file(heads / label / "model.safetensors") for label in ("start", "task3"))
    for name, value in found.items():
        whole = f"vit.{name}"
        factor = 2.0 * weighted.coefficient_of(whole)
        torch.testing.assert_close(
            value.double(), start[whole].double() + factor * (tuned[whole].double() - start[whole].double()), rtol=0, atol=1e-6
        )
