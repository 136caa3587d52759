"""The callback that watches a task vector grow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_info

from lata_lightning.alignment import Alignment, alignment_of
from lata_lightning.callbacks.export_checks import check_exports
from lata_lightning.callbacks.figures import log_heat_map
from lata_lightning.callbacks.handover import (
    DEFAULT_RULE,
    VECTOR_NAME,
    check_kinds,
    closing_lines,
    folder,
    weigh_run,
    write_exports,
)
from lata_lightning.callbacks.history import HISTORY_NAME, append_history, cut_history, log_figures, read_history, summary
from lata_lightning.callbacks.run_directory import begin_output, check_output, end_output, remove_partial_output
from lata_lightning.display.layer_tables import alignment_table
from lata_lightning.display.tables import show
from lata_lightning.errors import LataError, OutputError
from lata_lightning.layers import LayerRule, Level, check_level
from lata_lightning.live.gathering import export, manifest_of
from lata_lightning.live.measuring import Measurement
from lata_lightning.live.new_heads import head_of
from lata_lightning.live.tracker import Fingerprint, Tracker
from lata_lightning.moments import Start, check_start, total
from lata_lightning.store.dtypes import float_dtype
from lata_lightning.store.head_files import Head
from lata_lightning.store.names import LeaveOut
from lata_lightning.vectors.task_vector import TaskVector
from lata_lightning.weighting import DEFAULT_THRESHOLD, Rule, Weighting, follows_alignment, rule_name

STATE_VERSION = 1


class LATACallback(pl.Callback):
    """Measure the task vector while it is trained, and export it with its layer coefficients at the end.

    Keeps the weights the fine-tune starts from, and at every epoch end takes three sums per tensor between them, the weights in training and a
    stored instruction vector. Training is bit for bit what it would be without the callback.

    Args:
        instruction_vector: A saved instruction vector, or a pair (base, instruct) of models to take the difference of. Without one only norms
            are measured, and alignment can be computed from the exported vector later (``lata align``).
        start: What the fine-tune starts from: ``"instruct"`` or ``"base"``.
        weighting: Rule for the coefficients: ``"linear"``, ``"log"``, ``"threshold"`` or ``"none"``, or a function from the alignment to the coefficient
            by layer. If none is given, ``"linear"`` is stored in the vector, and exports are weighted by it unless the alignments are too flat to
            rank by.
        level: Unit of the coefficients: ``"block"``, ``"submodule"`` or ``"tensor"``.
        every_n_epochs: Measure at the end of every n-th epoch; 0 for the end of training only.
        every_n_train_steps: Measure whenever another n optimizer steps are done, too.
        base_weights: How the start weights are kept (see below): ``"auto"``, ``"lora"``, ``"source"``, ``"spill"`` or ``"memory"``; any other text is
            a directory or checkpoint that holds them.
        output_dir: Where history and vector go; by default a folder named after ``name`` in the trainer's log directory. It must not hold
            the results of another run. What an unfinished run from the same start weights has left there is replaced, as by a job that is
            requeued before its first checkpoint.
        export: What to write at the end of training: ``"vector"``, and what other tools take (see ``lata_lightning.exports``): ``"pure"``, ``"hf"``,
            ``"peft"``, ``"mergekit"``, ``"coefficients"``. Each goes to a folder of its name in the output directory (the vector to
            ``task_vector``).
        threshold: For the rule ``"threshold"``.
        outside: Coefficient of the tensors that belong to no layer.
        model: Path of the model inside the LightningModule, where it holds several.
        layers: Rule that names the blocks, for modules of no known layout (see ``layer_map``).
        leave_out: Regular expressions, searched in tensor names. What matches is neither measured nor exported: a head that belongs to one task,
            or embeddings to which training adds tokens. A classification head of transformers that the start does not hold, or holds in another size,
            is left out by itself. What is left out of such a head is saved in the output directory at the end: ``head.safetensors`` and ``head.json``.
        dtype: Precision of the exported vector.
        table: Print a table of the layers at the end of training.
        name: Prefix of the logged keys. Several callbacks in one trainer need different names.

    Logged, where ``{name}`` is ``lata`` unless given, through ``LightningModule.log`` with the same value on every rank:

    ========================== =================================================================================
    key                        value
    ========================== =================================================================================
    ``{name}/task_norm``       ‖τ‖ over the whole model
    ``{name}/relative_norm``   ‖τ‖ / ‖τ_instr‖ over the whole model
    ``{name}/alignment``       cos(τ + τ_instr, τ_instr) over the whole model
    ``{name}/alignment_min``   smallest alignment of a layer; also ``_max``, and ``_spread`` for their difference
    ========================== =================================================================================

    All but the first need an instruction vector. Figures of each layer go to every logger as ``{name}/alignment/{layer}``,
    ``{name}/relative_norm/{layer}`` and ``{name}/task_norm/{layer}``, and to ``history.jsonl`` in the output directory.
    TensorBoard and W&B get a picture of the alignments over the run at its end, ``{name}/alignment_by_layer``, where matplotlib is installed.

    Start weights, kept of trainable tensors only and never below the precision the trainer holds; the log says what was chosen and what it costs:

    ============== ================================================ ==========================================================
    base_weights   what is kept                                     cost per trainable parameter
    ============== ================================================ ==========================================================
    ``"lora"``     nothing: the frozen base is the start            0 bytes
    ``"source"``   the path of the directory the model was loaded   0 bytes of memory; read again at each measurement. Refused if
                   from, if its weights are the start values        the files change while training runs
    ``"spill"``    files in the output directory, one per process,  0 bytes of memory, 4 of disk (float32); removed at the end of
                   which also a requeued run finds                  training
    ``"memory"``   copies on the CPU, pinned for a GPU              4 bytes (float32) in all: under DDP shared out over the
                                                                    processes, under FSDP2 each keeps those of its shards
    a path         the path                                         as ``"source"``, also where a resumed model was built anew
    ``"auto"``     ``lora`` for what is under adapters, else        as that
                   ``source`` if possible, else ``memory``
    ============== ================================================ ==========================================================

    Checkpoint state, which loads with ``weights_only=True``, some 50 bytes per tensor:

    =============== =====================================================================================================
    key             value
    =============== =====================================================================================================
    ``version``     1
    ``last_step``   optimizer steps at the last measurement, or None
    ``fingerprint`` two sums over the bits of each start tensor, by which a resumed run knows its start again
    =============== =====================================================================================================

    Works on one device, under DDP (and DeepSpeed ZeRO-1 and 2, which hold parameters as DDP does) and under FSDP2
    (``ModelParallelStrategy``). Only sums cross between processes, in one reduction per measurement;
    the export gathers one tensor at a time.

    Raises:
        LataError: An argument has no meaning; the start weights of a resumed run cannot be known; the strategy flattens the weights.

    Source: LATA, arXiv:2502.20186.
    """

    def __init__(
        self,
        instruction_vector: tuple[str, str] | str | Path | TaskVector | None = None,
        start: Start = "instruct",
        weighting: Weighting | Rule | None = None,
        level: Level = "block",
        every_n_epochs: int = 1,
        every_n_train_steps: int | None = None,
        base_weights: str = "auto",
        output_dir: str | Path | None = None,
        export: Sequence[Literal["vector", "pure", "hf", "peft", "mergekit", "coefficients"]] = ("vector",),
        *,
        threshold: float = DEFAULT_THRESHOLD,
        outside: float = 0.0,
        model: str | None = None,
        layers: LayerRule | str | None = None,
        leave_out: Sequence[str] = (),
        dtype: str = "float32",
        table: bool = True,
        name: str = "lata",
    ) -> None:
        if every_n_epochs < 0 or (every_n_train_steps is not None and every_n_train_steps < 1):
            raise LataError(
                f"every_n_epochs must be at least 0 and every_n_train_steps at least 1, got {every_n_epochs} and {every_n_train_steps}"
            )
        float_dtype(dtype)
        self.instruction_vector = instruction_vector
        self.start, self.weighting, self.level = check_start(start), weighting, check_level(level)
        rule_name(weighting or DEFAULT_RULE)
        self.every_n_epochs, self.every_n_train_steps = every_n_epochs, every_n_train_steps
        self.base_weights, self.output_dir, self.export = base_weights, output_dir, check_kinds(export)
        self.threshold, self.outside, self.model, self.layers, self.dtype, self.table, self.name = (
            threshold, outside, model, layers, dtype, table, name
        )  # fmt: skip
        self.leave_out = LeaveOut(leave_out).patterns
        self.alignment: Alignment | None = None
        """The last measurement; with coefficients once training has ended."""
        self._tracker: Tracker | None = None
        self._measurement: Measurement | None = None
        self._restored: Fingerprint | None = None
        self._last_step: int | None = None
        self._directory: Path | None = None
        self._written: int | None = None
        """Step of the last line in the history."""
        self._epoch = 0
        self._settled = self._decided = self._begun = self._finished = False
        self._fresh, self._fitting, self._searched, self._at_fit_end = True, False, False, False

    @property
    def state_key(self) -> str:
        """Key of the callback's state in a checkpoint; differs between callbacks of different names."""
        return self._generate_state_key(name=self.name)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Keep the weights tentatively: on one device and under DDP this is the last hook before a resumed run restores trained ones."""
        self._fitting = stage == "fit"
        if not self._fitting:
            return
        _refuse_flattened(trainer.strategy)
        self._restored, self._searched, self._directory, self._finished = None, False, None, False
        if self._settled and trainer.global_step > 0 and self._tracker is not None and self._tracker.root is pl_module:
            return  # Another fit of the same trainer goes on from the weights it has: the start stays what it was.
        self._last_step, self._settled, self.alignment = None, False, None
        self._tracker = Tracker(
            pl_module, model=self.model, base_weights=self.base_weights, layers=self.layers, leave_out=LeaveOut(self.leave_out)
        )
        self._measurement = Measurement(self._tracker, _open_instruction(self.instruction_vector), self.start)
        if not trainer.strategy.restore_checkpoint_after_setup:
            self._tracker.ranks.agree(self._tracker.capture_early)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Settle which weights are the start: the model now has its final precision, and a resumed run its trained weights."""
        log_dir = trainer.log_dir  # Every rank has to ask for it, or those that do wait for the others.
        if not getattr(trainer, "fast_dev_run", False):
            self._directory = Path(self.output_dir or Path(log_dir or trainer.default_root_dir) / self.name)
        tracker = self._require_tracker()
        # Under weight averaging the model ends with weights that only stand after every other callback's on_train_end.
        averaged = any(isinstance(callback, WeightAveraging | StochasticWeightAveraging) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        self._at_fit_end = averaged and not trainer.strategy.restore_checkpoint_after_setup
        if not self._settled:
            tracker.ranks.agree(lambda: self._check_companions(trainer))
            tracker.ranks.agree(lambda: tracker.settle(self._directory))
            rank_zero_info(f"LATACallback: start weights: {tracker.describe()}")
            if tracker.head.describe():
                rank_zero_info(f"LATACallback: {tracker.head.describe()}")
            self._require_measurement().check_instruction(self.level, weighted=self.weighting != "none")
            self._settled, self._decided = True, False
            if not trainer.strategy.restore_checkpoint_after_setup:
                self._decide(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up the history where the checkpoint that is resumed leaves it; only now is its step known."""
        # Some strategies restore a checkpoint after on_fit_start; before, nothing tells that there is one.
        if not self._decided:
            self._decide(trainer)
        if trainer.is_global_zero and self._directory is not None:
            cut_history(self._directory / HISTORY_NAME, trainer.global_step)
        self._load_written(trainer)
        self._epoch = trainer.current_epoch
        every, epochs = self.every_n_train_steps, trainer.fit_loop.epoch_progress.current
        passed_over = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch and epochs.ready == epochs.completed
        if self._last_step is None:
            self._last_step = trainer.global_step or None
        elif (
            passed_over
            and self._last_step != trainer.global_step
            and self.every_n_epochs
            and trainer.current_epoch % self.every_n_epochs == 0
        ):
            # An exception ended the first run after the last batch of an epoch: Lightning takes it for done, but its end was not measured.
            self._epoch = trainer.current_epoch - 1
            self._measure(trainer, pl_module, on_step=None)
            self._epoch = trainer.current_epoch
        elif every is not None and trainer.global_step // every > self._last_step // every:
            # The checkpoint was written in between a step and the measurement that was due after it.
            self._measure(trainer, pl_module, on_step=None)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Keep what was unfrozen by a hook that ran after ours."""
        self._require_tracker().capture_unfrozen()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Before the first step, look whether weights were loaded late; before any step, keep what was unfrozen since the last one."""
        tracker, self._epoch = self._require_tracker(), trainer.current_epoch
        if not self._begun:
            if self._fresh:
                tracker.ranks.agree(tracker.capture_late)
            tracker.begin()
            tracker.note_frozen()
            self._begun = True
        tracker.capture_unfrozen()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Measure when another ``every_n_train_steps`` optimizer steps are done."""
        every = self.every_n_train_steps
        # Compared in multiples, as several optimizers advance global_step by more than one.
        if every is not None and trainer.global_step // every > (self._last_step or 0) // every:
            self._measure(trainer, pl_module, on_step=True)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure at the end of every ``every_n_epochs``-th epoch."""
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._measure(trainer, pl_module, on_step=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure once more if steps were taken since, then export."""
        if not self._at_fit_end:
            self._finish(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export the averaged weights of an averaged run that took steps, and what a run killed after its last step had no time to export."""
        late = self._decided and not self._fresh and trainer.global_step > 0 and not self._exported()
        if (self._at_fit_end and self._begun) or (late and not self._finished):
            self._finish(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Version, last measured step, and two sums over the bits of each start tensor; None before a fit has settled them."""
        fingerprint = None if self._tracker is None else dict(self._tracker.fingerprint) or None
        return {"version": STATE_VERSION, "last_step": self._last_step, "fingerprint": fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state of the run that is resumed."""
        version = state_dict.get("version", STATE_VERSION)
        if version > STATE_VERSION:
            raise LataError(
                f"the checkpoint's LATACallback state is of version {version}, this release reads up to {STATE_VERSION}. Upgrade it."
            )
        if not self._fitting:
            return  # Testing a checkpoint between two fits says nothing about the run.
        # The learning-rate and batch-size finders save and load once before a fresh run has started: that is no resume.
        self._searched = state_dict.get("fingerprint") is None
        if not self._searched:
            self._restored = state_dict["fingerprint"]
            self._last_step = state_dict.get("last_step")

    def _require_tracker(self) -> Tracker:
        if self._tracker is None:
            raise LataError("LATACallback was not set up: it has to be among the trainer's callbacks when fit is called")
        return self._tracker

    def _require_measurement(self) -> Measurement:
        if self._measurement is None:
            raise LataError("LATACallback was not set up: it has to be among the trainer's callbacks when fit is called")
        return self._measurement

    def _check_companions(self, trainer: pl.Trainer) -> None:
        others = [other for other in trainer.callbacks if isinstance(other, LATACallback) and other is not self]  # type: ignore[attr-defined]
        if any(other.name == self.name for other in others):
            raise LataError(
                f"LATACallbacks in one trainer must have different names, and two are called {self.name!r}: give one another name=…"
            )
        if self._directory is not None and any(other._directory == self._directory for other in others):
            raise OutputError(f"two LATACallbacks would write to {self._directory}; give each an output_dir of its own")

    def _decide(self, trainer: pl.Trainer) -> None:
        """Fresh or resumed? A fresh run must not meet the output of another, a resumed one must have its first start weights."""
        tracker = self._require_tracker()
        self._fresh = self._restored is None and (trainer.ckpt_path is None or self._searched)
        tracker.ranks.agree(tracker.forget_frozen if self._fresh else lambda: tracker.take_up(self._restored))
        tracker.note_fingerprint()
        if not self._fresh:
            tracker.verify(self._restored)
        if self._directory is not None:
            self._enter(self._directory, writes=trainer.is_global_zero)
        self._load_written(trainer)
        self._decided, self._begun = True, False

    def _enter(self, directory: Path, *, writes: bool) -> None:
        """Make the output directory ready: empty for a fresh run, without half-written output for a resumed one."""
        tracker = self._require_tracker()
        if self._fresh:
            results = dict.fromkeys((VECTOR_NAME, *map(folder, self.export)))
            note = tracker.ranks.agree(lambda: check_output(directory, tracker.fingerprint, results))
            tracker.ranks.agree(lambda: check_exports(self.export, tracker, self._require_measurement()))
            if note is not None:
                rank_zero_info(f"LATACallback: {note}")
        if writes and self._fresh:
            begin_output(directory, tracker.fingerprint)
        elif writes:
            remove_partial_output(directory)

    def _load_written(self, trainer: pl.Trainer) -> None:
        """Note the step of the last line in the history."""
        rows = read_history(self._directory / HISTORY_NAME) if self._directory is not None and trainer.is_global_zero else []
        self._written = rows[-1]["step"] if rows else None

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, on_step: bool | None) -> None:
        """Take the sums and log; ``on_step`` is None where logging through the module is not allowed any more."""
        tracker = self._require_tracker()
        table = self._require_measurement().moments()
        alignment = alignment_of(table, tracker.positions, self.level, self.start)
        figures = summary(total(table.values()), alignment, self.instruction_vector is not None)
        self.alignment, self._last_step = alignment, trainer.global_step
        if not trainer.barebones and on_step is not None:
            logged = {f"{self.name}/{key}": value for key, value in figures.items()}
            # For monitors only: loggers get the figures below, with the step they belong to.
            pl_module.log_dict(logged, logger=False, on_step=on_step, on_epoch=not on_step, rank_zero_only=False, batch_size=1)
        if trainer.is_global_zero and self._written != trainer.global_step:
            log_figures(trainer.loggers, self.name, figures, alignment, trainer.global_step)
            if self._directory is not None:
                append_history(self._directory / HISTORY_NAME, trainer.global_step, self._epoch, figures, alignment)
            self._written = trainer.global_step

    def _finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure what training ended with, and export it."""
        if self._last_step != trainer.global_step or self.alignment is None or self._at_fit_end:
            self._measure(trainer, pl_module, on_step=None)
        tracker = self._require_tracker()
        tracker.ranks.agree(tracker.kept.check_origin)
        alignment = self.alignment if self._require_measurement().instruction is not None else None
        manifest = manifest_of(tracker, self.start, alignment, trainer.global_step, trainer.current_epoch)
        head = head_of(tracker.look(), tracker.head.names, tracker.location)
        tracker.ranks.agree(lambda: export(tracker, lambda vector: self._write(vector, head), manifest))
        self._finished = True
        if trainer.is_global_zero:
            tracker.kept.close()
            if self._directory is not None:
                end_output(self._directory)
            log_heat_map(trainer.loggers, self.name, self._directory, trainer.global_step)

    def _exported(self) -> bool:
        return self._directory is None or all((self._directory / folder(kind)).exists() for kind in self.export)

    def _write(self, vector: TaskVector, head: Head | None) -> None:
        """On rank zero: weight the vector, show it, write it and a head that was left out of it, and say what to do with them."""
        alignment, instruction = vector.manifest.alignment, self._require_measurement().instruction
        vector, handed_over = weigh_run(vector, self.weighting, instruction, threshold=self.threshold, outside=self.outside)
        if alignment is not None:
            self.alignment = vector.manifest.alignment
            ranked = vector.manifest.coefficients is not None and follows_alignment(vector.manifest.weighting)
            if self.table and self.alignment is not None:
                title = f"{self.name}: alignment at step {vector.manifest.step}"
                show(alignment_table(self.alignment, title, cautions=ranked))
            elif ranked:
                for sentence in alignment.cautions():
                    rank_zero_info(f"LATACallback: {sentence}")
        if self._directory is not None:
            if head is not None:
                # Before the vector, which marks the run as finished.
                head.save(self._directory)
            write_exports(vector, handed_over, self.export, self._directory, dtype=self.dtype, instruction=instruction)
            saved = str(self.instruction_vector) if isinstance(self.instruction_vector, str | Path) else None
            for line in closing_lines(vector, handed_over, self.export, self._directory, instruction=saved, head=head is not None):
                rank_zero_info(f"LATACallback: {line}")


def _refuse_flattened(strategy: Strategy) -> None:
    """Refuse strategies under which parameters are not there whole, nor as shards that can be placed."""
    if isinstance(strategy, FSDPStrategy):
        what = "FSDPStrategy packs parameters into flat pieces"
    elif isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3:
        what = "DeepSpeed ZeRO-3 empties parameters between uses"
    else:
        return
    raise LataError(f"{what}, which LATACallback cannot read; use ModelParallelStrategy (FSDP2), DDP, DeepSpeed ZeRO-1 or 2, or one device")


def _open_instruction(given: str | Path | Sequence[str] | TaskVector | None) -> TaskVector | None:
    if given is None or isinstance(given, TaskVector):
        return given
    if isinstance(given, str | Path):
        return TaskVector.open(given)
    if len(given) != 2:
        raise LataError(f"instruction_vector must be a saved vector or a pair (base, instruct), got {given!r}")
    return TaskVector.between(given[0], given[1], kind="instruction")
