"""One task vector out of several by regression: each matrix does on every task's own inputs what that task's vector does, as nearly as one matrix can."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from lata_lightning.errors import LataError
from lata_lightning.linearity.from_vectors import made_of, merge_matrices, solving_device
from lata_lightning.linearity.positions import few_positions
from lata_lightning.linearity.stages import Merged, Stages
from lata_lightning.linearity.start import StartModel, open_start
from lata_lightning.linearity.units import Blocks
from lata_lightning.linearity.walk import Batch, check_samples, row_count
from lata_lightning.numerics.matrix_regression import Prior, Settings
from lata_lightning.store.opening import open_source
from lata_lightning.store.views import View
from lata_lightning.store.writer import Progress
from lata_lightning.vectors.provenance import Derivation, Identity, Input
from lata_lightning.vectors.task_vector import TaskVector

DEFAULT_OFF_DIAGONAL = 0.9
DEFAULT_RIDGE = 1e-6
"""With samples; without them it is that of ``Settings``."""


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
    """Make one task vector out of several by regression, matrix by matrix, from samples of each task or from the vectors alone.

    With C_t the mean of x xᵀ over what a linear layer takes in on task t, the one matrix is W = (Σ τ_t C_t + λ P)(Σ C_t + λ I)⁻¹. On the inputs of
    every task it does, as nearly as one matrix can, what that task's own vector does.

    Without samples C_t is τ_tᵀτ_t, because training writes the rows of a vector as combinations of its inputs. Every matrix is solved so, those of
    embeddings and heads too, and everything else is the mean of the vectors that change it. A tensor of the result is computed when it is read.

    With samples the matrices of linear layers are solved, rows of an embedding are the mean of the vectors' rows weighted by how often each task uses
    them, and everything else (biases, norms, convolutions, fused experts, and what the samples never reach) is the plain mean. Every task weighs the
    same, however many samples it has. Padding does not count.

    Args:
        vectors: Task vectors of one start. Coefficients they may have do not count.
        start: The model that the vectors started from. With samples: directory or hub id of a transformers model, or a module, which they run through;
            dropout is off, and it does not change. Without: as for ``merge_matrices``.
        samples: For each vector batches of inputs of the model, by argument name, with an ``attention_mask`` where rows are padded; in all about
            twice as many positions as the widest layer takes in numbers. How rows are split into batches makes no difference but memory.
        ridge: λ in units of the mean of the diagonal of Σ C_t; positive. By default 1 without samples, 1e-6 with them.
        prior: P, which directions get that no input has: ``"sum"`` (task arithmetic) or ``"mean"`` of the vectors. By default the sum without samples, the
            mean with them.
        in_order: With samples: whether a block takes in what the merged blocks before it give out, and every task's own block runs on that (RegMean++, the
            default); otherwise all blocks of a task are its own (RegMean).
        off_diagonal: With samples: factor of the entries of C_t off the diagonal, in [0, 1]; 0.9 by default.
        data: With samples: recorded in the manifest as where each task's samples come from.
        device: Without samples: where matrices are solved, such as ``"cuda"``.
        check_base: Refuse vectors that are known to start from different weights.
        progress: With samples: called after each stage (a block, an embedding, a head) is read, with the bytes read so far and the bytes in all.
        note: With samples: called, before the model runs, with a sentence about every task that has too few positions for the widest layer.

    Returns:
        A float32 vector, which merged at scale 1 is the merge of all. Tensors that are known to be unchanged in all vectors are so in it. Its manifest
        says from what it was made, and which matrices are plain means; without samples also, once it is saved, how far the vectors interfere.
        Without samples, a matrix that all vectors hold as factors comes out as factors, of the sum of their ranks. With samples, a tensor that is
        used at several places (a tied head, a block that is run again) is fitted at the first of them.

    Raises:
        LataError: There is no vector; some count from instruct and some from base; a number is out of range; an option for samples is given without them.
            With samples: they and the vectors are not equally many, a task has none, a vector started from base, there is no start, or there is
            padding that cannot be found in the inputs of a layer.
        SourceError, LayoutMismatchError, BaseMismatchError, WeightingError: As ``solve_coefficients``.
        CorruptFileError: A vector, or what goes into a layer, is not finite.

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
    found = open_start(start, vectors, check_base=check_base)
    shell, names = found.shell, {other: name for name, other in found.stored.items()}
    absent = [frozenset(names[name] for name in reader.names if not reader.holds(name)) for reader in found.matched.readers]
    merged = Merged(found.vectors, absent, f"the regression of {len(vectors)} vectors")
    frozen = frozenset.intersection(*found.matched.unchanged)
    named = [(vector.label, reader) for vector, reader in zip(vectors, found.vectors, strict=True)]
    blocks = Blocks(shell, found.layers)
    if note is not None:
        for sentence in few_positions(shell, blocks, [vector.label for vector in vectors], samples):
            note(sentence)
    unchanged = frozenset(names[name] for name in frozen)
    stages = Stages(shell, found.weights, named, merged, blocks.tensors, unchanged, samples, in_order=in_order)
    stages.fit(off_diagonal=off_diagonal, settings=settings, progress=progress)
    return made_of(
        found.matched,
        View(merged, {name: names[name] for name in found.matched.held}),
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
                for name in found.matched.held
                if len(merged.shape(names[name])) > 1 and names[name] not in merged.fitted and name not in frozen
            ),
        ),
        Identity(found.weights.location, found.weights.revision),
    )
