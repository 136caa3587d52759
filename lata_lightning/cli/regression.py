"""``lata regress``."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import ArgumentParser, Namespace

from lata_lightning.cli.common import ALL_LAYERS, Command, add_all, add_format, add_workers, note, print_json, progress_bar
from lata_lightning.cli.linearity import EACH, add_samples, check_data, samples_of, vectors_of
from lata_lightning.cli.writing import add_writing
from lata_lightning.errors import LataError, first_three
from lata_lightning.store.dtypes import FloatName
from lata_lightning.store.output_policy import end_dry_run

if TYPE_CHECKING:
    from lata_lightning.vectors.task_vector import TaskVector

_ONLY_WITH_DATA = {"samples": 30, "max_tokens": 512, "batch_size": 8, "in_order": True, "off_diagonal": None}
"""Options that have no meaning without samples, with their defaults."""


def _arguments(parser: ArgumentParser) -> None:
    add_samples(parser, f"{EACH}. Without it every matrix is solved from the vectors alone", required=False)
    parser.add_argument("--output", required=True, help="Directory to write the one vector to, which lata merge adds to START.")
    parser.add_argument(
        "--ridge",
        type=float | None,
        help="Weight of the prior, in units of the mean of what is solved. By default 1, and 1e-6 with --data.",
    )
    parser.add_argument(
        "--prior",
        type=Literal["sum", "mean"] | None,
        help="What the result is drawn to: the sum of the vectors, which is plain task arithmetic, or their mean. By default the sum, with --data the "
        "mean.",
    )
    parser.add_argument(
        "--in-order",
        type=bool,
        default=True,
        help="With --data: fit each block to what the merged blocks before it give out; 'false': to what those of each task's own model give out, which "
        "is faster.",
    )
    parser.add_argument(
        "--off-diagonal",
        type=float | None,
        help="With --data: factor, from 0 to 1, of the entries off the diagonal of the matrices of inputs; 0.9 by default.",
    )
    parser.add_argument("--device", default="cpu", help="Without --data: where matrices are solved, such as cuda.")
    parser.add_argument("--dtype", type=FloatName, default="float32", help="Precision to store the vector in.")
    parser.add_argument(
        "--vocabulary",
        type=Literal["onto"] | None,
        help="Without --data, for tuned models of other vocabularies: 'onto' keeps the tokens of START and drops others.",
    )
    add_workers(parser)
    add_format(parser)
    add_all(parser)
    add_writing(parser, hub=True)


def _regress(options: Namespace, command: str) -> None:
    from lata_lightning.display.layer_tables import derivation_table
    from lata_lightning.display.tables import show
    from lata_lightning.store.writer import check_free_directory

    check_free_directory(Path(options.output))
    vector = _from_vectors(options) if options.data is None else _from_samples(options)
    with progress_bar("write") as progress:
        saved = vector.save(options.output, dtype=options.dtype, workers=options.workers, progress=progress)
    derivation = saved.manifest.derivation
    if derivation is None:
        raise LataError(f"{options.output} does not say how it was made")
    averaged = derivation.averaged
    fitted = sum(len(saved.shape(name)) > 1 and name not in averaged and name not in saved.unchanged for name in saved)
    if averaged:
        why = "no linear layers or embeddings that the samples reach" if options.data else "no matrices"
        note(f"{why}, and so plain means, are {first_three(averaged)}")
    note(f"merge with: lata merge {options.start_model} {options.output} --output MERGED")
    if options.format == "json":
        print_json({"output": options.output, "fitted": fitted, "derivation": asdict(derivation), "matrices": vector.tensors.by_tensor()})
        return
    sys.stdout.write(f"{options.output}: one vector of {len(options.vectors)}, {len(saved)} tensors, {fitted} of them fitted\n")
    if derivation.measured:
        title = "Share of what each vector does on its own inputs that the merge changes (0: nothing)"
        show(derivation_table(derivation, title, every=options.all, hint=ALL_LAYERS))


def _from_vectors(options: Namespace) -> TaskVector:
    from lata_lightning.linearity.regression import regress
    from lata_lightning.merging.vocabularies import between_vocabularies
    from lata_lightning.store.directories import holds_vector
    from lata_lightning.store.opening import open_source
    from lata_lightning.vectors.aligning import check_same_model

    unused = [f"--{name.replace('_', '-')}" for name, default in _ONLY_WITH_DATA.items() if options[name] != default]
    if unused:
        raise LataError(f"{', '.join(unused)} can only be given with --data, as nothing is run without samples")
    if options.vocabulary is not None and options.model is not None:
        raise LataError(
            "--vocabulary compares the tokens of model directories, and --model picks a module of a checkpoint, which has no tokens. Save that "
            "module as a model directory with its tokenizer first, or leave one of the two out."
        )
    if options.vocabulary is None:
        vectors = vectors_of(options)
    else:
        saved = [path for path in options.vectors if holds_vector(path)]
        if saved:
            raise LataError(
                f"--vocabulary compares the tokens of models, and {saved[0]} is a saved vector. Give the tuned model in its place."
            )
        pairs = [between_vocabularies(options.start_model, path, "start", check_config=options.check_config) for path in options.vectors]
        vectors = [vector for vector, _ in pairs]
        for sentence in dict.fromkeys(sentence for _, sentences in pairs for sentence in sentences):
            note(sentence)
    check_same_model(open_source(options.start_model), vectors, by_token=options.vocabulary is None)
    return regress(
        vectors, options.start_model, ridge=options.ridge, prior=options.prior, device=options.device, check_base=options.check_base
    )


def _from_samples(options: Namespace) -> TaskVector:
    from lata_lightning.linearity.regression import regress

    unused = [f"--{name}" for name, default in (("device", "cpu"), ("vocabulary", None)) if options[name] != default]
    if unused:
        raise LataError(f"{', '.join(unused)} can only be given without --data")
    check_data(options)
    vectors, samples = vectors_of(options), samples_of(options, options.data)
    end_dry_run(Path(options.output))
    with progress_bar("regress") as progress:
        return regress(
            vectors,
            options.start_model,
            samples,
            ridge=options.ridge,
            prior=options.prior,
            in_order=options.in_order,
            off_diagonal=options.off_diagonal,
            data=options.data,
            check_base=options.check_base,
            progress=progress,
            note=note,
        )


COMMANDS = {
    "regress": Command(
        "Make one vector of several, matrix by matrix, from the vectors alone or from samples of each task.", _arguments, _regress
    ),
}
