"""Merging several task vectors into one by regression: on each task's inputs, every merged matrix comes as close as possible to that task's own."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from lata_lightning.errors import LataError
from lata_lightning.linearity.blocks import Blocks
from lata_lightning.linearity.from_vectors import made_of, merge_matrices, solving_device
from lata_lightning.linearity.matrix_fitting import FittedVector, MatrixFitting
from lata_lightning.linearity.samples import Batch, check_samples, few_positions, row_count
from lata_lightning.linearity.solving import DEFAULT_RIDGE
from lata_lightning.linearity.start import StartModel, open_start
from lata_lightning.numerics.matrix_regression import Prior, Settings
from lata_lightning.store.opening import open_source
from lata_lightning.store.views import View
from lata_lightning.store.writer import Progress
from lata_lightning.vectors.provenance import Derivation, Identity, Input
from lata_lightning.vectors.task_vector import TaskVector

DEFAULT_OFF_DIAGONAL = 0.9


def regress(
    vectors: Sequence[TaskVector],
    start: StartModel | None = None,
    samples: Sequence[Sequence[Batch]] | None = None,
    *,
    ridge: float | None = None,
    prior: Prior | None = None,
    in_order: bool | None = None,
    off_diagonal: float | None = None,
    data: Sequence[str] | None = None,
    device: str = "cpu",
    check_base: bool = True,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> TaskVector:
    """Merge several task vectors into one by regression, matrix by matrix, from samples of each task or from the vectors alone.

    With C_t the mean of x xᵀ over the inputs of a linear layer on task t (its Gram matrix), the merged matrix is W = (Σ τ_t C_t + λ P)(Σ C_t + λ I)⁻¹. On
    the inputs of every task its output is as close as possible to that of the task's own vector.

    Without samples C_t is τ_tᵀτ_t, because training makes the rows of a vector combinations of its inputs. Every matrix is solved this way, including
    embeddings and heads; every other tensor is the mean of the vectors that change it. Tensors of the result are computed when they are read.

    With samples the matrices of linear layers are solved. Rows of an embedding are means of the vectors' rows, weighted by how often each task uses them.
    Everything else (biases, norms, convolutions, fused experts, and matrices that the samples never reach) is the plain mean. Every task has the same
    weight, however many samples it has; padding does not count.

    Args:
        vectors: Task vectors of one start; their coefficients are ignored.
        start: The model that the vectors started from. With samples: directory or hub id of a transformers model, or a module, which does not change;
            dropout is off. Without samples: as for ``merge_matrices``.
        samples: For each vector, batches of inputs of the model by argument name, with an ``attention_mask`` if rows are padded. They should have about
            twice as many positions as the widest layer has inputs. The batch size only affects memory.
        ridge: λ in units of the mean of the diagonal of Σ C_t; positive. By default 1 without samples, 1e-6 with them.
        prior: P, the result in directions without inputs: ``"sum"`` (task arithmetic) or ``"mean"`` of the vectors. By default the sum without samples,
            the mean with them.
        in_order: With samples: whether the inputs of a block are the outputs of the merged blocks before it (RegMean++, the default), or those of the
            task's own blocks (RegMean).
        off_diagonal: With samples: factor of the entries of C_t off the diagonal, in [0, 1]; 0.9 by default.
        data: With samples: the origin of each task's samples, recorded in the manifest.
        device: Without samples: device to solve matrices on, such as ``"cuda"``.
        check_base: Refuse vectors that are known to start from different weights.
        progress: With samples: called after each block, embedding or head is read, with the bytes read so far and the bytes in all.
        note: With samples: called, before the model runs, with a sentence about each task whose samples have too few positions for the widest layer.

    Returns:
        A float32 vector to be added at scale 1. Tensors that are known to be unchanged in all vectors are recorded as unchanged in it. Its manifest
        records the vectors, and which matrices are plain means; without samples, also the interference of the vectors, once it is saved. Without
        samples, a matrix that all vectors store as factors is stored as factors too, whose rank is the sum of theirs. With samples, a tensor that is
        used several times (a tied head, a repeated block) is fitted at its first use.

    Raises:
        LataError: There is no vector, some started from instruct and some from base, a number is out of range, or an option for samples is given without
            them. With samples: the numbers of samples and vectors differ, a task has no samples, a vector started from base, there is no start, or
            the padding cannot be identified in the inputs of a layer.
        SourceError, LayoutMismatchError, BaseMismatchError, WeightingError: As for ``solve_coefficients``.
        CorruptFileError: A vector or a hidden state is not finite.

    Source: RegMean, arXiv:2212.09849, on task vectors; in order as RegMean++, arXiv:2508.03121. C_t from the vectors: WUDI, arXiv:2503.08099; ACTMat,
    arXiv:2604.01329. This package's choices: the prior and the ridge, embeddings by use, and equal weight of tasks.
    """
    if samples is None:
        given = {"in_order": in_order, "off_diagonal": off_diagonal, "data": data, "progress": progress}
        unused = [name for name, value in given.items() if value is not None]
        if unused:
            raise LataError(
                f"without samples there is nothing to run, so there can be no {', '.join(unused)}. Give samples as well, or leave it out."
            )
        settings = Settings(1.0 if ridge is None else ridge, prior or "sum", solving_device(device))
        opened = None if start is None else open_source(Path(start) if isinstance(start, os.PathLike) else start)
        return merge_matrices(vectors, "regression", start=opened, settings=settings, check_base=check_base)
    if start is None:
        raise LataError("samples are run through the start model: give it as well (start=…)")
    in_order = in_order is None or in_order
    off_diagonal = DEFAULT_OFF_DIAGONAL if off_diagonal is None else off_diagonal
    settings = Settings(DEFAULT_RIDGE if ridge is None else ridge, prior or "mean")
    check_samples(vectors, samples)
    if not 0 <= off_diagonal <= 1:
        raise LataError(f"the factor of entries off the diagonal must lie in [0, 1], got {off_diagonal}")
    if data is not None and len(data) != len(vectors):
        raise LataError(f"there must be one name of data for each vector: got {len(data)} for {len(vectors)} vectors")
    opened_start = open_start(start, vectors, check_base=check_base)
    model, names = opened_start.model, {other: name for name, other in opened_start.stored.items()}
    absent = [frozenset(names[name] for name in reader.names if not reader.holds(name)) for reader in opened_start.matched.readers]
    merged = FittedVector(opened_start.vectors, absent, f"the regression of {len(vectors)} vectors")
    frozen = frozenset.intersection(*opened_start.matched.unchanged)
    named = [(vector.label, reader) for vector, reader in zip(vectors, opened_start.vectors, strict=True)]
    blocks = Blocks(model, opened_start.layers)
    if note is not None:
        for sentence in few_positions(model, blocks, [vector.label for vector in vectors], samples):
            note(sentence)
    unchanged = frozenset(names[name] for name in frozen)
    fitting = MatrixFitting(model, opened_start.weights, named, merged, blocks.tensors, unchanged, samples, in_order=in_order)
    fitting.fit(off_diagonal=off_diagonal, settings=settings, progress=progress)
    return made_of(
        opened_start.matched,
        View(merged, {name: names[name] for name in opened_start.matched.covered}),
        Derivation(
            "regression",
            {"in_order": in_order, "off_diagonal": off_diagonal, "ridge": settings.ridge, "prior": settings.prior},
            tuple(
                Input(
                    vector.label,
                    vector.manifest.tuned_identity,
                    {"samples": row_count(samples[task]), "data": None if data is None else data[task]},
                )
                for task, vector in enumerate(vectors)
            ),
            averaged=tuple(
                name
                for name in opened_start.matched.covered
                if len(merged.shape(names[name])) > 1 and names[name] not in merged.fitted and name not in frozen
            ),
        ),
        Identity(opened_start.weights.location, opened_start.weights.revision),
    )
