"""Lightning's command line with the callback in place: the body of `lata fit`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from lata_lightning.callbacks.handover import folder
from lata_lightning.callbacks.lata import LATACallback
from lata_lightning.errors import LataError, first_line
from lata_lightning.store.output_policy import end_dry_run, set_aside
from lata_lightning.training.allocation import return_large_buffers
from lata_lightning.training.checkpoint_io import stream_checkpoints
from lata_lightning.training.classification import ImageClassificationModule, SequenceClassificationModule
from lata_lightning.training.fit_output import (
    CHECKPOINTS,
    LOGS,
    checkpoint_to_resume,
    log_folders,
    may_replace_run,
    newest_checkpoint,
    remove_failed_start,
)
from lata_lightning.training.interrupting import interruptible
from lata_lightning.training.labelled_data import ImageDataModule, LabelledTextDataModule
from lata_lightning.training.module import CausalLMModule
from lata_lightning.training.progress import FitProgress
from lata_lightning.training.text_data import TextDataModule

# Imported here so that a recipe may name these classes without their module; the first of each kind is the default.
MODULES = (CausalLMModule, SequenceClassificationModule, ImageClassificationModule)
DATA_MODULES = (TextDataModule, LabelledTextDataModule, ImageDataModule)


class FitCLI(LightningCLI):
    """The command ``fit``, with sections ``model``, ``data``, ``trainer`` and ``lata``, and one output directory for each run.

    =================== ============================================================================
    in the directory    what
    =================== ============================================================================
    ``lata/``           history and task vector of the callback
    ``checkpoints/``    Lightning checkpoints, also to resume from
    ``logs/version_n/`` metrics, and the whole configuration; a resumed run has a version of its own
    =================== ============================================================================

    ``model`` and ``data`` are any LightningModule and LightningDataModule, by class path; by default ``CausalLMModule`` and ``TextDataModule``.

    Args:
        arguments: The command line without the name of the program: ``["fit", "--config", …]``.
        parser_class: Class of the parser.
    """

    def __init__(self, arguments: Sequence[str], parser_class: type[LightningArgumentParser] = LightningArgumentParser) -> None:
        self._arguments = tuple(arguments)
        super().__init__(
            seed_everything_default=0,
            args=list(arguments),
            parser_kwargs={"prog": "lata", "fit": {"description": "Fine-tune a model and keep its task vector."}},
            parser_class=parser_class,
            auto_configure_optimizers=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return only ``fit``."""
        return {"fit": LightningCLI.subcommands()["fit"]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the section of the callback, the output directory, and the defaults for model and data."""
        parser.add_lightning_class_args(LATACallback, "lata")
        parser.add_argument("--output", type=str, default="run", help="Directory for what the run leaves; it must not hold another run.")
        parser.set_defaults({"model": {"class_path": _path(MODULES[0])}, "data": {"class_path": _path(DATA_MODULES[0])}})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the given arguments, never those of the running program."""
        self.config = parser.parse_args(args)

    def before_instantiate_classes(self) -> None:
        """Check the output directory before anything is loaded: refuse a run that cannot begin there, and turn 'last' into a path."""
        config = self._get(self.config, "lata")
        output = Path(self._get(self.config, "output"))
        measured = Path(config.output_dir) if config.output_dir else output / config.name
        if not self._get(self.config, "trainer").fast_dev_run:
            results = [measured / folder(kind) for kind in dict.fromkeys(("vector", *config.export))]
            given = self._get(self.config, "ckpt_path")
            if not may_replace_run(output, given, [LOGS, CHECKPOINTS, config.name]):
                self.config[self.subcommand].ckpt_path = checkpoint_to_resume(output, given, results, self._arguments)
        end_dry_run(output, reads=self._inputs())

    def _inputs(self) -> list[str]:
        """What the configuration names as model, data and instruction vector."""
        sections = [self._get(self.config, name).get("init_args") or {} for name in ("model", "data")]
        given = [sections[0].get("model"), sections[1].get("data"), self._get(self.config, "lata").instruction_vector]
        return [str(path) for value in given for path in (value if isinstance(value, list | tuple) else [value]) if path is not None]

    def instantiate_classes(self) -> None:
        """Create trainer, model and data; an error about an argument is raised with the message of the class that found it."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            # jsonargparse wraps what a constructor raises into a report on every type it tried.
            reason: BaseException | None = error
            while reason is not None and not isinstance(reason, LataError):
                reason = reason.__cause__ or reason.__context__
            raise reason or error from None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Return the trainer, which writes to the directory of the run unless other directories are given."""
        output = Path(self._get(self.config_init, "output"))
        given = self._get(self.config_init, "trainer", default={})
        directories: dict[str, Any] = {} if given.get("default_root_dir") else {"default_root_dir": str(output)}
        if given.get("logger") in (None, True):
            directories["logger"] = CSVLogger(output, name=LOGS)
        settings = {**directories, **_quiet_settings(given), **kwargs}
        try:
            trainer = super().instantiate_trainer(**settings)
        except (MisconfigurationException, TypeError, ValueError) as error:
            raise LataError(f"Lightning refuses these settings of the trainer: {first_line(error)}") from error
        stream_checkpoints(trainer)
        if trainer.strategy.root_device.type == "cpu":
            return_large_buffers()
        if given.get("fast_dev_run"):
            # A trial run is to write nothing, but ModelCheckpoint would still save the last weights.
            trainer.callbacks = [callback for callback in trainer.callbacks if not isinstance(callback, ModelCheckpoint)]  # type: ignore[attr-defined]
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, LATACallback) and callback.output_dir is None:
                callback.output_dir = output / callback.name
            elif isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(output / CHECKPOINTS)
        return trainer

    def before_fit(self) -> None:
        """Print how much is trained, and how large the checkpoints will be that Lightning writes by default."""
        parameters = list(self.model.parameters())
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        rank_zero_info(f"lata fit: trains {trained:,} of {sum(parameter.numel() for parameter in parameters):,} parameters")
        keeping = [callback for callback in self.trainer.callbacks if isinstance(callback, ModelCheckpoint)]  # type: ignore[attr-defined]
        size = _checkpoint_bytes(self.model)
        if keeping and size:
            rank_zero_info(
                f"lata fit: checkpoints of about {size / 1e9:.2g} GB each (weights, and two moments of each trained one) go to {keeping[0].dirpath}; "
                "write none with --trainer.enable_checkpointing false"
            )

    def fit(self, **keywords: Any) -> None:
        """Train; a start that fails before it logs anything leaves no empty folders.

        Raises:
            KeyboardInterrupt: The run was interrupted; it says how to go on.
        """
        output = Path(self._get(self.config_init, "output"))
        before = log_folders(output)
        resume = f"go on with: lata {shlex.join(self._arguments)} --ckpt_path last"
        try:
            # One process moves the earlier run; the others begin to write only after it has joined them.
            first = not getattr(rank_zero_only, "rank", 0)  # set by Lightning on its own decorator
            with set_aside(output, lambda: newest_checkpoint(output) is not None) if first else nullcontext() as earlier, interruptible():
                if earlier is not None:
                    resume += f"; the earlier run is in {earlier}"
                self.trainer.fit(**keywords)
        except BaseException as error:
            if self.trainer.is_global_zero:
                remove_failed_start(output, before)
            if isinstance(error, KeyboardInterrupt) and newest_checkpoint(output) is not None:
                raise KeyboardInterrupt(resume) from None
            raise


def _quiet_settings(given: Any) -> dict[str, Any]:
    """Settings of the trainer for one line of progress and no table of modules, where the configuration does not set them."""
    settings: dict[str, Any] = {} if given.get("enable_model_summary") else {"enable_model_summary": False}
    callbacks = given.get("callbacks") or []
    callbacks = list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks]
    if given.get("enable_progress_bar") is not False and not any(isinstance(callback, ProgressBar) for callback in callbacks):
        settings["callbacks"] = [*callbacks, FitProgress()]
    return settings


def _checkpoint_bytes(module: LightningModule) -> int:
    """Return the size of a checkpoint: its weights, and the two moments that AdamW keeps for each trained one."""
    parameters = list(module.parameters())
    # A module that can load from a part of its weights is assumed to save only those it trains.
    saved = sum(parameter.nbytes for parameter in parameters if module.strict_loading or parameter.requires_grad)
    return saved + 2 * sum(parameter.nbytes for parameter in parameters if parameter.requires_grad)


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
