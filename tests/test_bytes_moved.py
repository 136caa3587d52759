"""What merging, extracting and aligning cost, counted in bytes: every input byte is read once, every output byte written once, in small pieces."""

import os

import pytest
import torch
from in_factors import random_factors, vector_in_factors
from tiny_models import read_back, write_model

from lata_lightning.merging.merge import Term, merge
from lata_lightning.numerics.chunks import CHUNK, in_parallel, worker_count
from lata_lightning.vectors.aligning import align
from lata_lightning.vectors.artefact import verify
from lata_lightning.vectors.task_vector import TaskVector

ROWS, COLUMNS = 2000, 300
NAMES = [f"model.layers.{block}.{part}.weight" for block in range(2) for part in ("self_attn.q_proj", "mlp.up_proj")]
SIZE = len(NAMES) * ROWS * COLUMNS


def large(seed, dtype=torch.bfloat16):
    """A model whose tensors are several pieces long and end inside of one."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(ROWS, COLUMNS, generator=generator).to(dtype) for name in NAMES}


@pytest.fixture
def models(tmp_path):
    return [write_model(tmp_path / f"model-{seed}", large(seed)) for seed in range(3)]


@pytest.fixture
def moved(monkeypatch):
    """Bytes read from and written to files while a test runs, and the largest piece of either."""
    counts = {"read": 0, "written": 0, "largest": 0}
    preadv, pwrite = os.preadv, os.pwrite

    def read(descriptor, buffers, offset):
        count = preadv(descriptor, buffers, offset)
        # The length of a header lies at the beginning of a file, and the header behind it.
        data = count if offset > 8 else 0
        counts["read"] += data
        counts["largest"] = max(counts["largest"], data)
        return count

    def write(descriptor, data, offset):
        count = pwrite(descriptor, data, offset)
        # Headers are written at the beginning of a file.
        counts["written"] += count if offset else 0
        counts["largest"] = max(counts["largest"], count)
        return count

    monkeypatch.setattr(os, "preadv", read)
    monkeypatch.setattr(os, "pwrite", write)
    return counts


def test_a_merge_of_tuned_models_reads_each_model_once_and_writes_the_result_once(tmp_path, models, moved):
    onto, *tuned = models
    merge(onto, [Term(TaskVector.between(onto, model), 0.3) for model in tuned], tmp_path / "out")
    assert moved == {"read": 3 * 2 * SIZE, "written": 2 * SIZE, "largest": 2 * CHUNK}


def test_a_merge_of_saved_vectors_reads_each_of_them_once(tmp_path, models, moved):
    onto, *tuned = models
    for index, model in enumerate(tuned):
        TaskVector.between(onto, model).save(tmp_path / f"vector-{index}")
    moved.update(read=0, written=0, largest=0)
    merge(onto, [Term(TaskVector.open(tmp_path / f"vector-{index}"), 0.3) for index in range(2)], tmp_path / "out")
    assert moved == {"read": 2 * SIZE + 2 * 4 * SIZE, "written": 2 * SIZE, "largest": 4 * CHUNK}


def test_what_a_merge_leaves_alone_is_copied_without_reading_the_vector(tmp_path, models, moved):
    onto, tuned, _ = models
    merge(onto, [Term(TaskVector.between(onto, tuned), 0.0)], tmp_path / "out")
    assert moved == {"read": 2 * SIZE, "written": 2 * SIZE, "largest": 2 * CHUNK}


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_extracting_reads_both_models_once_and_writes_the_vector_once(tmp_path, models, moved, dtype, width):
    TaskVector.between(models[0], models[1]).save(tmp_path / "vector", dtype=dtype)
    assert moved == {"read": 2 * 2 * SIZE, "written": width * SIZE, "largest": max(2, width) * CHUNK}


def test_aligning_and_verifying_read_the_vectors_once(tmp_path, models, moved):
    for index in range(2):
        TaskVector.between(models[index], models[index + 1]).save(tmp_path / f"vector-{index}")
    moved.update(read=0, written=0, largest=0)
    align(TaskVector.open(tmp_path / "vector-0"), TaskVector.open(tmp_path / "vector-1"), check_base=False)
    assert moved["read"] == 2 * 4 * SIZE
    assert moved["largest"] <= 4 * 131072
    moved.update(read=0)
    verify(tmp_path / "vector-0")
    assert moved["read"] == 4 * SIZE


def test_the_result_does_not_depend_on_the_number_of_workers_or_the_size_of_chunks(tmp_path, models, monkeypatch):
    onto, *tuned = models
    results = []
    for number, (workers, piece) in enumerate([(1, CHUNK), (2, CHUNK), (5, CHUNK), (1, 4096), (3, 70_001)]):
        monkeypatch.setattr("lata_lightning.numerics.chunks.CHUNK", piece)
        terms = [Term(TaskVector.between(onto, model), scale) for model, scale in zip(tuned, (0.37, -0.81), strict=True)]
        merge(onto, terms, tmp_path / f"out-{number}", workers=workers)
        TaskVector.between(onto, tuned[0]).save(tmp_path / f"vector-{number}", dtype="float16", workers=workers)
        results.append(
            {**read_back(tmp_path / f"out-{number}"), **{f"vector {k}": v for k, v in read_back(tmp_path / f"vector-{number}").items()}}
        )
    assert all(torch.equal(result[name], results[0][name]) for result in results for name in results[0])
    alignments = []
    for workers in (1, 2, 5):
        monkeypatch.setattr("lata_lightning.numerics.chunks.worker_count", lambda _, workers=workers: workers)
        alignments.append(align(TaskVector.open(tmp_path / "vector-0"), TaskVector.between(*tuned), check_base=False))
    assert alignments[0] == alignments[1] == alignments[2]


def test_an_error_in_one_worker_ends_the_others_and_is_the_one_that_is_raised():
    done = []

    def work(item):
        if item == 3:
            raise ValueError("three")
        done.append(item)
        return item

    with pytest.raises(ValueError, match="three"):
        in_parallel(work, list(range(1000)), 2)
    assert len(done) < 1000
    assert in_parallel(work, [0, 1, 2], 2) == [0, 1, 2]


def test_torch_has_its_threads_back_when_the_workers_are_done():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert in_parallel(lambda _: torch.get_num_threads(), [0, 1], 2) == [1, 1]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_at_least_one_worker_is_needed():
    from lata_lightning import LataError

    assert 1 <= worker_count(None) <= 4
    with pytest.raises(LataError, match="number of workers must be at least 1, got 0"):
        worker_count(0)


@pytest.mark.parametrize("in_factors", ["task", "instruction"])
@pytest.mark.parametrize("start", ["instruct", "base"])
def test_aligning_a_vector_in_factors_reads_the_dense_one_once_and_chunk_by_chunk(tmp_path, models, moved, in_factors, start):
    dense = TaskVector.between(models[0], models[1]).save(tmp_path / "dense")
    factors = random_factors(large(0), NAMES[:1])
    low = vector_in_factors(tmp_path / "low", large(0), factors)
    task, instruction = (low, dense) if in_factors == "task" else (dense, low)
    moved.update(read=0, written=0, largest=0)
    found = align(task, instruction, start=start, check_base=False, level="tensor")
    assert moved["read"] == 4 * SIZE + 4 * 2 * (ROWS + COLUMNS)
    assert moved["largest"] <= 4 * 131072
    product = factors[NAMES[0]][0].double() @ factors[NAMES[0]][1].double()
    one, other = (product, dense[NAMES[0]].double()) if in_factors == "task" else (dense[NAMES[0]].double(), product)
    one = one - other if start == "base" else one
    expected = torch.nn.functional.cosine_similarity((one + other).flatten(), other.flatten(), dim=0).item()
    assert found.layers[NAMES[0]].alignment == pytest.approx(expected, abs=1e-9)


def test_merging_a_vector_in_factors_reads_the_start_once_and_chunk_by_chunk(tmp_path, models, moved):
    low = vector_in_factors(tmp_path / "low", large(0), random_factors(large(0), NAMES[:1]))
    moved.update(read=0, written=0, largest=0)
    merge(models[0], [Term(low)], tmp_path / "merged", check_base=False)
    assert moved["read"] == 2 * SIZE + 4 * 2 * (ROWS + COLUMNS)
    assert moved["largest"] <= 2 * CHUNK
