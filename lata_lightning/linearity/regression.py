"""One task vector out of several: each weight matrix does on every task's own inputs what that task's vector does there, as nearly as one matrix can."""

from __future__ import annotations

from collections.abc import Sequence

from lata_lightning.errors import LataError
from lata_lightning.linearity.stages import Merged, Stages
from lata_lightning.linearity.units import Blocks
from lata_lightning.linearity.walk import Batch, StartModel, check_samples, opened, row_count
from lata_lightning.store.writer import Progress
from lata_lightning.vectors.manifest import Derivation, Identity, Input, Manifest, TensorEntry
from lata_lightning.vectors.task_vector import TaskVector

DEFAULT_OFF_DIAGONAL = 0.9
DEFAULT_RIDGE = 1e-6


def regress(
    start: StartModel,
    vectors: Sequence[TaskVector],
    samples: Sequence[Sequence[Batch]],
    *,
    in_order: bool = True,
    off_diagonal: float = DEFAULT_OFF_DIAGONAL,
    ridge: float = DEFAULT_RIDGE,
    data: Sequence[str] | None = None,
    check_base: bool = True,
    progress: Progress | None = None,
) -> TaskVector:
    """One task vector whose linear layers give out, on the inputs of every task, what is closest to what that task's own vector makes of them.

    For each weight matrix of a linear layer, with τ_t those of the vectors and x the inputs of the layer, it is the W of least
    Σ_t E_{x∼task t} ‖(W − τ_t) x‖², with the entries of E x xᵀ off the diagonal shrunk. Rows of an embedding are the mean of the vectors' rows weighted by
    how often each task uses them. Everything else (biases, norms, convolutions, fused experts) is the plain mean of the vectors, and so is each
    matrix, and each row of an embedding, that the samples never reach. Every task weighs the same, however many samples it has; padding does not count.

    Args:
        start: Directory or hub id of a transformers model, or a module. Dropout is off, and it does not change.
        vectors: Task vectors from this start. Coefficients they may have do not count.
        samples: For each vector batches of inputs of the model, by argument name: about 30 rows of its task, with an ``attention_mask`` where rows are
            padded. How rows are split into batches makes no difference but memory.
        in_order: Whether a block takes in what the merged blocks before it give out, and every task's own block runs on that (RegMean++); otherwise
            all blocks of a task are its own (RegMean).
        off_diagonal: Factor of the entries off the diagonal, in [0, 1].
        ridge: Added to the diagonal of what is solved, in units of its mean; it pulls directions that no input has to the mean of the vectors.
        data: Recorded in the manifest as where each task's samples come from.
        check_base: Refuse vectors that are known to start from different weights.
        progress: Called after each stage (a block, an embedding, a head) is read, with the bytes read so far and the bytes in all.

    Returns:
        A vector in memory, float32. Merged at scale 1 it is the merge of all; tensors that are known to be unchanged in all vectors are so in it. Its
        manifest says from what it was made, and which matrices are plain means. A tensor that is used at several places (a tied head, a block
        that is run again) is fitted at the first of them.

    Raises:
        LataError: Samples and vectors are not equally many, a task has no samples, a number is out of range, there is no vector, one started from base, or
            there is padding that cannot be found in the inputs of a layer.
        SourceError, LayoutMismatchError, BaseMismatchError, WeightingError: As ``solve_coefficients``.
        CorruptFileError: A vector, or what goes into a layer, is not finite.

    Source: RegMean, arXiv:2212.09849, on task vectors; in order as RegMean++, arXiv:2508.03121. The ridge, embeddings by use and equal weight of tasks are
    this package's choices.
    """
    check_samples(vectors, samples)
    if not 0 <= off_diagonal <= 1:
        raise LataError(f"the factor of entries off the diagonal must lie in [0, 1], got {off_diagonal}")
    if not ridge > 0:
        raise LataError(f"the ridge must be positive, got {ridge}")
    if data is not None and len(data) != len(vectors):
        raise LataError(f"there must be one name of data for each vector: got {len(data)} for {len(vectors)} vectors")
    shell, source, readers = opened(start, vectors, check_base=check_base)
    merged = Merged(readers, f"the regression of {len(vectors)} vectors")
    unchanged = frozenset.intersection(*(vector.unchanged for vector in vectors))
    named = [(vector.label, reader) for vector, reader in zip(vectors, readers, strict=True)]
    blocks = Blocks(shell, vectors[0].layers).tensors
    stages = Stages(shell, source, named, merged, blocks, unchanged, samples, in_order=in_order)
    stages.fit(off_diagonal=off_diagonal, ridge=ridge, progress=progress)
    averaged = (name for name in merged.names if len(merged.shape(name)) > 1 and name not in merged.fitted and name not in unchanged)
    first = vectors[0].manifest
    manifest = Manifest(
        kind="task",
        start=first.start,
        layers=first.layers,
        start_identity=first.start_identity if first.start_identity != Identity() else Identity(source.location, source.revision),
        tied=first.tied,
        tensors={name: TensorEntry(merged.shape(name), "float32", unchanged=True) for name in merged.names if name in unchanged},
        derivation=Derivation(
            "regression",
            {"in_order": in_order, "off_diagonal": off_diagonal, "ridge": ridge},
            tuple(
                Input(
                    vector.label,
                    vector.manifest.tuned_identity,
                    {"samples": row_count(samples[task]), "data": None if data is None else data[task]},
                )
                for task, vector in enumerate(vectors)
            ),
            averaged=tuple(averaged),
        ),
    )
    return TaskVector(merged, manifest)
