import itertools
import weakref

import numpy as np
import pytest
import torch
from linear_models import Chain, changed, tuned, vectors_of
from safetensors.torch import save_file
from tiny_models import llama
from torch import nn

from lata_lightning import TaskVector, solve_coefficients
from lata_lightning.errors import BaseMismatchError, CorruptFileError, LataError, LayoutMismatchError, SourceError, WeightingError
from lata_lightning.linearity.model_weights import ModelWeights
from lata_lightning.linearity.solving import Products
from lata_lightning.store.file_source import FileSource


def rows(count, width=4, seed=0, length=3):
    return torch.randn(count, length, width, generator=torch.Generator().manual_seed(seed))


def tokens(count, length, seed=0):
    return torch.randint(0, 24, (count, length), generator=torch.Generator().manual_seed(seed))


def of_layer(solution, layer):
    return [solved.coefficients[layer] for solved in solution.vectors]


def least_squares(start, models, samples):
    """The optimum per block of a Chain from outputs written down one under the other, each task divided by the root of its positions."""
    found = {}
    for index, block in enumerate(start.blocks):
        inputs = []
        for hidden in samples:
            for before in start.blocks[:index]:
                hidden = before(hidden)
            inputs.append(hidden.reshape(-1, hidden.shape[-1]))
        with torch.no_grad():
            changes = [[(model.blocks[index](x) - block(x)).double().flatten() / len(x) ** 0.5 for x in inputs] for model in models]
            columns = torch.stack([torch.cat(parts) for parts in changes], dim=1)
            aim = torch.cat([changes[task][task] for task in range(len(models))])
        found[f"blocks.{index}"] = np.linalg.lstsq(columns.numpy(), aim.numpy(), rcond=None)[0]
    return found


@pytest.mark.parametrize("count", [2, 3])
def test_blocks_that_are_linear_in_their_parameters_get_the_least_squares_optimum(count):
    start = Chain()
    models = [tuned(start, seed=seed) for seed in range(1, count + 1)]
    # Unequal amounts, as every task must weigh the same nevertheless.
    samples = [rows(2 + 3 * task, seed=task) for task in range(count)]
    solution = solve_coefficients(start, vectors_of(start, models), [[{"hidden": x}] for x in samples], ridge=0.0)
    expected = least_squares(start, models, samples)
    assert set(expected) == {"blocks.0", "blocks.1"}
    for layer, numbers in expected.items():
        assert of_layer(solution, layer) == pytest.approx(numbers, abs=1e-5)


def test_the_default_ridge_moves_the_optimum_by_no_more_than_its_size():
    start = Chain()
    models = [tuned(start, seed=seed) for seed in (1, 2)]
    samples = [[{"hidden": rows(5, seed=seed)}] for seed in (1, 2)]
    exact, ridged = (solve_coefficients(start, vectors_of(start, models), samples, **options) for options in ({"ridge": 0.0}, {}))
    for layer in ("blocks.0", "blocks.1"):
        # |(A + r)⁻¹b − A⁻¹b| ≤ r ‖A⁻¹‖ |α|, and r ‖A⁻¹‖ ≤ 1e-6 · condition.
        bound = 1e-6 * exact.fits[layer].condition * np.linalg.norm(of_layer(exact, layer))
        difference = np.abs(np.subtract(of_layer(exact, layer), of_layer(ridged, layer))).max()
        assert 0 < difference <= bound


def test_a_single_task_keeps_its_whole_vector():
    start = Chain()
    solution = solve_coefficients(start, vectors_of(start, [tuned(start)]), [[{"hidden": rows(3)}]])
    assert of_layer(solution, "blocks.0") == pytest.approx([1.0], abs=2e-6)
    assert solution.fits["blocks.0"].residual == pytest.approx(0.0, abs=1e-6)


def test_vectors_that_act_on_the_samples_of_their_own_task_only_are_kept_whole():
    start = Chain(width=2, depth=1)
    weight = start.blocks[0].weight.detach()
    # One vector reads the first coordinate, the other the second, and each task's samples have one coordinate only.
    models = [
        changed(start, blocks__0__weight=weight + torch.tensor(step)) for step in ([[1.0, 0.0], [2.0, 0.0]], [[0.0, 1.0], [0.0, 3.0]])
    ]
    inputs = [torch.randn(1, 5, 1) * torch.tensor(axis) for axis in ([1.0, 0.0], [0.0, 1.0])]
    solution = solve_coefficients(start, vectors_of(start, models), [[{"hidden": x}] for x in inputs])
    assert of_layer(solution, "blocks.0") == pytest.approx([1.0, 1.0], abs=1e-5)


def test_orthogonal_changes_that_are_as_strong_on_every_sample_are_kept_by_half():
    # A vector is wanted on the samples of its own task and unwanted on those of the other: A = diag(2, 18), b = (1, 9).
    start = Chain(width=2, depth=1)
    models = [changed(start, blocks__0__bias=start.blocks[0].bias.detach() + torch.tensor(step)) for step in ([1.0, 0.0], [0.0, 3.0])]
    solution = solve_coefficients(start, vectors_of(start, models), [[{"hidden": rows(4, width=2, seed=seed)}] for seed in (1, 2)])
    assert of_layer(solution, "blocks.0") == pytest.approx([0.5, 0.5], abs=1e-5)


def test_two_tasks_with_one_vector_share_it():
    start = Chain()
    vectors = vectors_of(start, [tuned(start), tuned(start)])
    solution = solve_coefficients(start, vectors, [[{"hidden": rows(4, seed=seed)}] for seed in (1, 2)])
    assert of_layer(solution, "blocks.1") == pytest.approx([0.5, 0.5], abs=1e-5)
    assert solution.fits["blocks.1"].condition == pytest.approx(2e6, rel=0.05)


def test_opposite_vectors_leave_what_the_two_tasks_do_not_agree_on():
    # By hand: Δ_1 = 1 and Δ_2 = −1 everywhere, A = [[2, −2], [−2, 2]], b = (0, 0): nothing helps both.
    start = Chain(width=1, depth=1)
    models = [changed(start, blocks__0__bias=start.blocks[0].bias.detach() + step) for step in (1.0, -1.0)]
    solution = solve_coefficients(start, vectors_of(start, models), [[{"hidden": rows(2, width=1)}]] * 2)
    assert of_layer(solution, "blocks.0") == pytest.approx([0.0, 0.0], abs=1e-6)
    assert solution.fits["blocks.0"].residual == pytest.approx(1.0)


def test_the_numbers_of_two_tasks_worked_by_hand():
    # Biases move by 1 and 2, so Δ_1 = 1, Δ_2 = 2 on both tasks: A = [[2, 4], [4, 8]], b = (3, 6), smallest solution (0.3, 0.6), and 1.5 instead of 1
    # and of 2 leaves 0.25 + 0.25 of 1 + 4.
    start = changed(Chain(width=1, depth=1), blocks__0__weight=[[0.0]], blocks__0__bias=[0.0])
    models = [changed(start, blocks__0__bias=[step]) for step in (1.0, 2.0)]
    solution = solve_coefficients(start, vectors_of(start, models), [[{"hidden": rows(2, width=1)}]] * 2, ridge=0.0)
    assert of_layer(solution, "blocks.0") == pytest.approx([0.3, 0.6], abs=1e-5)
    assert solution.fits["blocks.0"].residual == pytest.approx(0.1, abs=1e-5)


def test_a_layer_that_no_vector_moves_has_coefficient_1_and_no_fit():
    start = Chain()
    model = changed(start, blocks__0__bias=torch.ones(4))
    solution = solve_coefficients(start, vectors_of(start, [model]), [[{"hidden": rows(2)}]])
    assert of_layer(solution, "blocks.1") == [1.0]
    assert (solution.fits["blocks.1"].condition, solution.fits["blocks.1"].residual) == (None, None)


def test_a_task_whose_vector_stands_still_in_a_layer_gets_no_share_of_it():
    start = Chain()
    models = [changed(start, blocks__0__bias=torch.ones(4)), tuned(start)]
    solution = solve_coefficients(start, vectors_of(start, models), [[{"hidden": rows(2)}]] * 2)
    assert of_layer(solution, "blocks.1") == pytest.approx([0.0, 0.5], abs=1e-5)


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    """A start and two tuned models, in memory and on disk, and their vectors on disk."""
    directory = tmp_path_factory.mktemp("llamas")
    start = llama()
    models = [tuned(start, size=0.05, seed=seed) for seed in (1, 2)]
    start.save_pretrained(directory / "start")
    for number, model in enumerate(models):
        TaskVector.between(start, model).save(directory / f"vector-{number}")
    return start, models, directory


def samples_of(batch_rows, length=6):
    """Samples of two tasks without padding, so many rows a batch."""
    ids = [tokens(4, length, seed=seed) for seed in (1, 2)]
    return [[{"input_ids": part} for part in task.split(batch_rows)] for task in ids]


@pytest.mark.parametrize("level", ["block", "submodule"])
def test_block_by_block_from_disk_equals_everything_in_memory(llamas, level):
    start, models, directory = llamas
    streamed = solve_coefficients(
        directory / "start", [TaskVector.open(directory / f"vector-{number}") for number in (0, 1)], samples_of(2), level=level
    )
    held = solve_coefficients(start, vectors_of(start, models), samples_of(2), level=level)
    assert [solved.coefficients for solved in streamed.vectors] == [solved.coefficients for solved in held.vectors]
    assert streamed.fits == held.fits
    assert streamed.start.location == str(directory / "start")


def test_every_block_is_read_once_and_after_the_one_before(llamas, monkeypatch):
    _, _, directory = llamas
    reads = []
    read = FileSource.read
    monkeypatch.setattr(FileSource, "read", lambda self, name: (reads.append((id(self), name)), read(self, name))[1])
    vectors = [TaskVector.open(directory / f"vector-{number}") for number in (0, 1)]
    reads.clear()
    seen = []
    solve_coefficients(directory / "start", vectors, samples_of(1), progress=lambda done, size: seen.append((done, size)))
    assert len(reads) == len(set(reads))
    blocks = [name.split(".")[2] for _, name in reads if ".layers." in name]
    assert [(block, len(list(run))) for block, run in itertools.groupby(blocks)] == [("0", 27), ("1", 27)]
    # The head takes no part in it.
    assert not any("lm_head" in name for _, name in reads)
    assert [done / size for done, size in seen] == [0.5, 1.0]


def test_one_block_of_the_start_and_of_each_vector_is_in_memory(llamas, monkeypatch):
    _, _, directory = llamas
    held = []
    fill = ModelWeights.fill

    def watched(self, names, *rest):
        block = next((name.split(".")[2] for name in names if ".layers." in name), None)
        left = {other for other, reference in held if reference() is not None and None not in (block, other)}
        assert left <= {block}
        values = fill(self, names, *rest)
        held.extend((block, weakref.ref(tensor)) for tensor in values.values())
        return values

    monkeypatch.setattr(ModelWeights, "fill", watched)
    vectors = [TaskVector.open(directory / f"vector-{number}") for number in (0, 1)]
    solve_coefficients(directory / "start", vectors, samples_of(1), level="submodule")
    # Two blocks of nine tensors and the embedding and last norm, of the start; two blocks of each vector.
    assert len(held) == 2 * 9 + 2 + 2 * 2 * 9
    assert all(reference() is None for block, reference in held if block is not None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_module_on_a_gpu_is_run_on_the_cpu():
    start = llama()
    models = [tuned(start, seed=seed) for seed in (1, 2)]
    here = solve_coefficients(start, vectors_of(start, models), samples_of(2))
    there = solve_coefficients(start.cuda(), vectors_of(start, models), samples_of(2))
    assert [solved.coefficients for solved in here.vectors] == [solved.coefficients for solved in there.vectors]


@pytest.mark.parametrize("level", ["block", "submodule"])
def test_padding_changes_nothing(llamas, level):
    start, models, _ = llamas
    plain = samples_of(2)
    padded = [
        [
            {
                "input_ids": torch.cat([batch["input_ids"], torch.full((2, 3), 7)], dim=1),
                "attention_mask": torch.cat([torch.ones(2, 6), torch.zeros(2, 3)], dim=1).long(),
            }
            for batch in task
        ]
        for task in plain
    ]
    one, other = (solve_coefficients(start, vectors_of(start, models), samples, level=level) for samples in (plain, padded))
    for left, right in zip(one.vectors, other.vectors, strict=True):
        assert left.coefficients == pytest.approx(right.coefficients, abs=1e-5)
    # Counted as if it were text, it would change them.
    counted = [[{"input_ids": batch["input_ids"]} for batch in task] for task in padded]
    wrong = solve_coefficients(start, vectors_of(start, models), counted, level=level)
    assert wrong.vectors[0].coefficients != pytest.approx(one.vectors[0].coefficients, abs=1e-3)


def test_the_size_of_batches_changes_nothing(llamas):
    start, models, _ = llamas
    one, other = (solve_coefficients(start, vectors_of(start, models), samples_of(size)) for size in (1, 4))
    for left, right in zip(one.vectors, other.vectors, strict=True):
        assert left.coefficients == pytest.approx(right.coefficients, abs=1e-5)
        assert (left.samples, right.samples) == (4, 4)


def test_dropout_is_off_and_the_start_stays_as_it_is():
    start = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)) for _ in range(2))).train()
    before = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    found = [
        solve_coefficients(start, vectors_of(start, [tuned(start), tuned(start, seed=2)]), [[{"input": rows(3)}]] * 2).vectors
        for _ in range(2)
    ]
    assert found[0] == found[1]
    assert start.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in start.state_dict().items())


def test_a_bfloat16_start_is_run_in_float32(llamas):
    _, models, _ = llamas
    half = llama(dtype=torch.bfloat16)
    whole = llama().bfloat16().float()
    vectors = [TaskVector.between(half, model) for model in models], [TaskVector.between(whole, model) for model in models]
    one, other = (solve_coefficients(model, found, samples_of(4)) for model, found in zip((half, whole), vectors, strict=True))
    assert [solved.coefficients for solved in one.vectors] == [solved.coefficients for solved in other.vectors]


def test_norms_and_what_is_outside_have_the_coefficient_that_was_given(llamas):
    start, models, _ = llamas
    solution = solve_coefficients(start, vectors_of(start, models), samples_of(4), level="submodule", outside=0.25)
    weighted = solution.apply(vectors_of(start, models))[0]
    for name in ("model.layers.0.input_layernorm.weight", "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"):
        assert weighted.coefficient_of(name) == 0.25
    assert set(solution.fits) == {f"model.layers.{index}.{part}" for index in (0, 1) for part in ("attention", "mlp")}


class Listed(nn.Module):
    """Its attention is a list of projections that the block itself runs."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
            self.mlp = nn.Linear(4, 4)

        def forward(self, hidden):
            return self.mlp(self.attention[0](hidden) + self.attention[1](hidden))

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Listed.Block() for _ in range(2)])

    def forward(self, hidden):
        return self.blocks[1](self.blocks[0](hidden))


def test_a_part_that_is_a_mere_list_is_run_as_its_block():
    start = Listed()
    models = [tuned(start, seed=seed) for seed in (1, 2)]
    samples = [rows(3, seed=seed) for seed in (1, 2)]
    solution = solve_coefficients(start, vectors_of(start, models), [[{"hidden": x}] for x in samples], level="submodule", ridge=0.0)

    def change(model, hidden):
        """Of the block's output while only the attention moves."""
        block, other = start.blocks[0], model.blocks[0].attention
        return block.mlp(other[0](hidden) + other[1](hidden)) - block(hidden)

    with torch.no_grad():
        columns = torch.stack([torch.cat([change(model, x).flatten() for x in samples]) for model in models], dim=1)
        aim = torch.cat([change(model, x).flatten() for model, x in zip(models, samples, strict=True)])
    assert of_layer(solution, "blocks.0.attention") == pytest.approx(
        np.linalg.lstsq(columns.double(), aim.double(), rcond=None)[0], abs=1e-4
    )


class Forgetful(nn.Module):
    """Never runs its second block."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])

    def forward(self, hidden, attention_mask=None):
        return self.blocks[0](hidden)


class Silent(nn.Module):
    """Its blocks give out no tensor."""

    class Block(nn.Linear):
        def forward(self, hidden):
            return None

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Silent.Block(4, 4) for _ in range(2)])

    def forward(self, hidden):
        return [block(hidden) for block in self.blocks]


class Turned(Chain):
    """Hidden states as (positions, rows, width)."""

    def forward(self, hidden, attention_mask=None):
        return super().forward(hidden.transpose(0, 1))


def refused(start, error, match, *, models=None, samples=None, **options):
    models = [tuned(start)] if models is None else models
    with pytest.raises(error, match=match):
        solve_coefficients(
            start, vectors_of(start, models), [[{"hidden": rows(2)}]] * len(models) if samples is None else samples, **options
        )


def test_invalid_requests_are_refused():
    start = Chain()
    refused(start, LataError, "per block or per submodule, not per tensor", level="tensor")
    refused(start, LataError, "got 2 sets for 1 vectors", samples=[[{"hidden": rows(1)}]] * 2)
    refused(start, LataError, "there are none for", samples=[[]])
    refused(start, LataError, "the ridge must not be negative, got -1", ridge=-1)
    refused(start, LataError, "give at least one vector", models=[])
    with pytest.raises(
        LataError, match=r"from base started 1: .* Give the tuned models in their place, take the instruction vector off first"
    ):
        solve_coefficients(start, [TaskVector.between(start, tuned(start), start_kind="base")], [[{"hidden": rows(1)}]])


def test_models_that_cannot_be_measured_are_refused():
    refused(Forgetful(), LataError, r"never run are 1: \['blocks.1'\]")
    refused(Silent(), LataError, "blocks.0 gives out no tensor")
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    refused(Turned(), LataError, r"padding of a batch of shape \(2, 3\)", samples=[[{"hidden": rows(2), "attention_mask": mask}]])
    refused(nn.Linear(4, 4), WeightingError, "there is no layer to run")
    broken = Chain()
    refused(
        broken,
        CorruptFileError,
        r"NaN or infinite hidden states in blocks.0",
        models=[changed(broken, blocks__0__bias=torch.full((4,), torch.inf))],
    )


def test_a_start_that_does_not_say_what_it_is_is_refused(tmp_path):
    start = Chain()
    save_file(start.state_dict(), tmp_path / "start.safetensors")
    with pytest.raises(SourceError, match=r"start.safetensors does not say which model to run"):
        solve_coefficients(tmp_path / "start.safetensors", vectors_of(start, [tuned(start)]), [[{"hidden": rows(1)}]])


def test_a_start_without_all_tensors_is_refused(llamas, tmp_path):
    start, models, _ = llamas
    start.save_pretrained(tmp_path / "part")
    part = {name: tensor for name, tensor in start.state_dict().items() if "layers.1.mlp" not in name}
    save_file(part, tmp_path / "part/model.safetensors", metadata={"format": "pt"})
    vector = TaskVector.between(tmp_path / "part", {name: models[0].state_dict()[name] for name in part})
    with pytest.raises(LayoutMismatchError, match=r"missing are 3: \['model.layers.1.mlp.down_proj.weight'"):
        solve_coefficients(tmp_path / "part", [vector], samples_of(4)[:1])


def test_a_start_of_other_sizes_than_its_config_says_is_refused(tmp_path):
    start = llama()
    start.save_pretrained(tmp_path / "start")
    other = {name: torch.zeros(5) if name.endswith("norm.weight") else tensor for name, tensor in start.state_dict().items()}
    save_file(other, tmp_path / "start/model.safetensors", metadata={"format": "pt"})
    vector = TaskVector.between(tmp_path / "start", tmp_path / "start")
    with pytest.raises(LayoutMismatchError, match=r"has the shape \(5,\), and the model needs \(8,\)"):
        solve_coefficients(tmp_path / "start", [vector], samples_of(4)[:1])


def test_vectors_from_different_starts_are_refused_unless_told_otherwise(tmp_path):
    start, other = Chain(), Chain()
    vectors = [TaskVector.between(origin, tuned(origin)).save(tmp_path / str(number)) for number, origin in enumerate((start, other))]
    with pytest.raises(BaseMismatchError, match="different weights"):
        solve_coefficients(start, vectors, [[{"hidden": rows(1)}]] * 2)
    assert solve_coefficients(start, vectors, [[{"hidden": rows(1)}]] * 2, check_base=False).vectors


def test_products_add_up_over_chunks():
    changes = torch.randn(2, 3000, 3, generator=torch.Generator().manual_seed(0))
    whole, pieces = Products(2), Products(2)
    whole.add(0, changes)
    for piece in changes.split(7, dim=1):
        pieces.add(0, piece)
    for products in (whole, pieces):
        products.add(1, changes.flip(0))
    assert whole.solve(0.0)[0] == pytest.approx(pieces.solve(0.0)[0], rel=1e-9)
