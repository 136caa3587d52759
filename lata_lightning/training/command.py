"""Lightning's command line with the callback in place: the body of `lata fit`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_info

from lata_lightning.callbacks.handover import folder
from lata_lightning.callbacks.lata import LATACallback
from lata_lightning.errors import LataError
from lata_lightning.training.classification import ImageClassificationModule, SequenceClassificationModule
from lata_lightning.training.fit_output import CHECKPOINTS, LOGS, checkpoint_to_resume, log_folders, remove_failed_start
from lata_lightning.training.labelled_data import ImageDataModule, LabelledTextDataModule
from lata_lightning.training.module import CausalLMModule
from lata_lightning.training.text_data import TextDataModule

# A recipe may name these without their module, as it is imported here; the first of each kind is what stands for no name.
MODULES = (CausalLMModule, SequenceClassificationModule, ImageClassificationModule)
DATA_MODULES = (TextDataModule, LabelledTextDataModule, ImageDataModule)


class FitCLI(LightningCLI):
    """``fit`` with sections ``model``, ``data``, ``trainer`` and ``lata``, and one directory for what a run leaves.

    =================== ============================================================================
    in the directory    what
    =================== ============================================================================
    ``lata/``           history and task vector of the callback
    ``checkpoints/``    Lightning checkpoints, also to resume from
    ``logs/version_n/`` metrics, and the whole configuration; a resumed run has a version of its own
    =================== ============================================================================

    ``model`` and ``data`` are any LightningModule and LightningDataModule by their class path, ``CausalLMModule`` and ``TextDataModule`` unless given.

    Args:
        arguments: The command line without the name of the program: ``["fit", "--config", …]``.
        parser_class: What parses it.
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
        """Only ``fit``."""
        return {"fit": LightningCLI.subcommands()["fit"]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The callback's section, the directory of the run, and what model and data are unless given."""
        parser.add_lightning_class_args(LATACallback, "lata")
        parser.add_argument("--output", type=str, default="run", help="Directory for what the run leaves; it must not hold another run.")
        parser.set_defaults({"model": {"class_path": _path(MODULES[0])}, "data": {"class_path": _path(DATA_MODULES[0])}})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses what was given, whatever the name and arguments of the program are."""
        self.config = parser.parse_args(args)

    def before_instantiate_classes(self) -> None:
        """Looks at the output directory before anything is loaded: a run that cannot begin there is refused, and 'last' becomes a path."""
        config = self._get(self.config, "lata")
        output = Path(self._get(self.config, "output"))
        measured = Path(config.output_dir) if config.output_dir else output / config.name
        if not self._get(self.config, "trainer").fast_dev_run:
            results = [measured / folder(kind) for kind in dict.fromkeys(("vector", *config.export))]
            given = self._get(self.config, "ckpt_path")
            self.config[self.subcommand].ckpt_path = checkpoint_to_resume(output, given, results, self._arguments)

    def instantiate_classes(self) -> None:
        """Makes trainer, model and data; what is wrong with an argument is said in the words of the class that found it."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            # jsonargparse puts what a constructor raises into a report on every type it tried.
            reason: BaseException | None = error
            while reason is not None and not isinstance(reason, LataError):
                reason = reason.__cause__ or reason.__context__
            raise reason or error from None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer, with everything that was given no place of its own put into the directory of the run."""
        output = Path(self._get(self.config_init, "output"))
        given = self._get(self.config_init, "trainer", default={})
        placed: dict[str, Any] = {} if given.get("default_root_dir") else {"default_root_dir": str(output)}
        if given.get("logger") in (None, True):
            placed["logger"] = CSVLogger(output, name=LOGS)
        trainer = super().instantiate_trainer(**placed, **kwargs)
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
        """Says what the checkpoints cost that Lightning writes unless told otherwise."""
        keeping = [callback for callback in self.trainer.callbacks if isinstance(callback, ModelCheckpoint)]  # type: ignore[attr-defined]
        size = _checkpoint_bytes(self.model)
        if keeping and size:
            rank_zero_info(
                f"lata fit: checkpoints of about {size / 1e9:.2g} GB each (weights, and two moments of each trained one) go to {keeping[0].dirpath}; "
                "write none with --trainer.enable_checkpointing false"
            )

    def fit(self, **keywords: Any) -> None:
        """Trains; a start that fails before it logs anything leaves no empty folders."""
        output = Path(self._get(self.config_init, "output"))
        before = log_folders(output)
        try:
            self.trainer.fit(**keywords)
        except BaseException:
            if self.trainer.is_global_zero:
                remove_failed_start(output, before)
            raise


def _checkpoint_bytes(module: LightningModule) -> int:
    """What a checkpoint takes: the weights it holds, and the two moments that AdamW keeps of each trained one."""
    parameters = list(module.parameters())
    # A module that loads from a part of its weights is taken to save what it trains.
    saved = sum(parameter.nbytes for parameter in parameters if module.strict_loading or parameter.requires_grad)
    return saved + 2 * sum(parameter.nbytes for parameter in parameters if parameter.requires_grad)


def _path(found: type) -> str:
    return f"{found.__module__}.{found.__qualname__}"
