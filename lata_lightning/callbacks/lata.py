"""The Lightning callback that watches a task vector grow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities import rank_zero_info

from lata_lightning.callbacks.artifacts import check_artifact, log_artifact
from lata_lightning.callbacks.following import RunCallback
from lata_lightning.callbacks.loggers import log_heat_map, log_measured
from lata_lightning.callbacks.run import Phase, Run
from lata_lightning.errors import LataError, OutputError
from lata_lightning.live.monitor import STATE_VERSION, check_version
from lata_lightning.store.run_directory import VECTOR_NAME


class LATACallback(RunCallback, pl.Callback):
    """Measure the task vector while it is trained, and export it with its layer coefficients at the end.

    It stores the weights that the fine-tune starts from. At the end of every epoch it takes three sums per tensor from them, from the weights in training
    and from an instruction vector. Training is bit for bit what it would be without the callback.

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
        base_weights: How the start weights are stored (see below): ``"auto"``, ``"lora"``, ``"source"``, ``"spill"`` or ``"memory"``; any other text is
            a directory or checkpoint that has them.
        output_dir: Where history and vector go; by default a folder named after ``name`` in the trainer's log directory. It must not have
            the results of another run. What an unfinished run from the same start weights has left there is replaced, as by a job that is
            requeued before its first checkpoint.
        export: What to write at the end of training: ``"vector"``, and what other tools take (see ``lata_lightning.exports``): ``"pure"``, ``"hf"``,
            ``"peft"``, ``"mergekit"``, ``"coefficients"``. Each goes to a folder of its name in the output directory (the vector to
            ``task_vector``).
        compare_with: Saved vectors by a name of your choice, as ``{"math": "runs/math/task_vector"}``. The cosine of the task vector with each is
            measured, too, over the whole model and by layer, as the vectors are stored, without coefficients. So a conflict between experts shows
            while it arises.
        threshold: For the rule ``"threshold"``.
        outside: Coefficient of the tensors that belong to no layer.
        model: Path of the model inside the LightningModule, where it has several.
        layers: Rule that names the blocks, for modules of no known layout (see ``layer_map``).
        leave_out: Regular expressions, searched in tensor names. What matches is neither measured nor exported: a head that belongs to one task,
            or embeddings to which training adds tokens. A classification head of transformers that the start does not have, or has in another size,
            is left out by itself. What is left out of such a head is saved in the output directory at the end: ``head.safetensors`` and ``head.json``.
        dtype: Precision of the exported vector.
        table: Print a table of the layers at the end of training.
        log_artifact: Send the saved vector to the WandbLogger of the trainer at the end of training, as an artifact of the type ``task_vector``.
        name: Prefix of the logged keys. Several callbacks in one trainer need different names.

    Logged, where ``{name}`` is ``lata`` unless given, through ``LightningModule.log`` with the same value on every rank:

    ========================== =================================================================================
    key                        value
    ========================== =================================================================================
    ``{name}/task_norm``       ‖τ‖ over the whole model
    ``{name}/relative_norm``   ‖τ‖ / ‖τ_instr‖ over the whole model
    ``{name}/alignment``       cos(τ + τ_instr, τ_instr) over the whole model
    ``{name}/alignment_min``   smallest alignment of a layer; also ``_max``, and ``_spread`` for their difference
    ``{name}/cosine/{other}``  cos(τ, other) over the whole model, for each vector of ``compare_with``
    ========================== =================================================================================

    All that have "alignment" or "relative" in their name need an instruction vector. Figures of each layer go to every logger as
    ``{name}_layers/alignment/{layer}``, ``{name}_layers/relative_norm/{layer}``, ``{name}_layers/task_norm/{layer}`` and
    ``{name}_layers/cosine/{other}/{layer}``, by the step that Lightning logs by, and to ``history.jsonl`` in the output directory. In the keys, numbers
    in names of layers are padded with zeros, so that loggers list the layers in order. Where matplotlib is installed, TensorBoard and W&B get a
    picture of the alignments so far with every measurement, ``{name}/alignment_by_layer``.

    Start weights are stored of trainable tensors only, and never below the precision of the trainer. The log says what was chosen and what it costs:

    ============== ================================================ ==========================================================
    base_weights   what is stored                                   cost per trainable parameter
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

    Works on one device, under DDP, under FSDP2 and tensor parallelism (``ModelParallelStrategy``), under FSDP1 (``FSDPStrategy``), and under DeepSpeed
    ZeRO-1 to 3, whose float32 masters are measured. Only sums cross between processes, in one reduction per measurement, and
    factors of sharded adapters; FSDP1 gathers the model once, unit by unit. The export gathers one tensor at a time.

    Raises:
        LataError: An argument has no meaning; the start weights of a resumed run cannot be known; the strategy does not show the weights.

    Source: LATA, arXiv:2502.20186.
    """

    # Set in setup. Of the stages of a trainer, only a fit concerns the run.
    _stage: str | None = None

    @property
    def state_key(self) -> str:
        """Key of the callback's state in a checkpoint; differs between callbacks of different names."""
        return self._generate_state_key(name=self.name)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Capture the weights: on one device and under DDP this is the last hook before a resumed run restores trained ones."""
        self._stage = stage
        if stage != "fit":
            return
        run = self.run
        if run is not None and run.phase >= Phase.SETTLED and trainer.global_step > 0 and run.tracker.root is pl_module:
            run.go_on()
            return
        self.run = Run(self, pl_module, lambda remark: rank_zero_info(f"LATACallback: {remark}"))
        if not trainer.strategy.restore_checkpoint_after_setup:
            self.run.capture()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Settle which weights are the start: the model now has its final precision, and a resumed run its trained weights."""
        run = self._require_run()
        log_dir = trainer.log_dir  # Every rank has to ask for it, or those that do wait for the others.
        if not getattr(trainer, "fast_dev_run", False):
            run.directory = Path(self.output_dir or Path(log_dir or trainer.default_root_dir) / self.name)
        run.tracker.wrapped_in(trainer.strategy.model)
        if run.phase < Phase.SETTLED:
            run.settle(lambda: self._check_companions(trainer))
            if self.log_artifact:
                check_artifact(trainer.loggers)
            # Some strategies restore a checkpoint after this hook; until then nothing tells that there is one.
            if not trainer.strategy.restore_checkpoint_after_setup:
                run.enter(resumes=trainer.ckpt_path is not None)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up the history where the checkpoint that is resumed leaves it, and measure what an interrupted run did not get to."""
        run, step, epoch = self._require_run(), trainer.global_step, trainer.current_epoch
        if run.phase < Phase.ENTERED:
            run.enter(resumes=trainer.ckpt_path is not None)
        run.take_up_history(step, epoch)
        if _epoch_was_passed_over(trainer) and run.last_step not in (None, step) and self.epoch_due(epoch - 1):
            run.epoch = epoch - 1
            self._measure(trainer, pl_module, on_step=None)
            run.epoch = epoch
        elif self.step_due(step, run.last_step):
            # The checkpoint was written in between a step and the measurement that was due after it.
            self._measure(trainer, pl_module, on_step=None)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Capture what was unfrozen by a hook that ran after ours."""
        self._require_run().tracker.capture_unfrozen()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Capture what can change from now on."""
        self._require_run().before_batch(trainer.current_epoch)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Measure when another ``every_n_train_steps`` optimizer steps are done."""
        if self.step_due(trainer.global_step, self._require_run().last_step):
            self._measure(trainer, pl_module, on_step=True)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure at the end of every ``every_n_epochs``-th epoch."""
        if self.epoch_due(trainer.current_epoch):
            self._measure(trainer, pl_module, on_step=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure once more if steps were taken since, then export."""
        if not _ends_with_averages(trainer):
            self._finish(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export the averaged weights of an averaged run that took steps, and what a run killed after its last step had no time to export."""
        run = self._require_run()
        late = run.phase >= Phase.ENTERED and not run.fresh and trainer.global_step > 0 and not run.exported
        if late or (_ends_with_averages(trainer) and run.tracker.begun):
            self._finish(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Version, last measured step, and two sums over the bits of each start tensor; None before a fit has settled them."""
        return {"version": STATE_VERSION, "last_step": None, "fingerprint": None} if self.run is None else self.run.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state of the run that is resumed."""
        check_version(state_dict, "LATACallback")
        # Testing a checkpoint between two fits says nothing about the run.
        if self.run is not None and self._stage == "fit":
            self.run.load_state_dict(state_dict)

    def on_init_end(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a Trainer of transformers, which calls this first.

        Raises:
            LataError: Always.
        """
        raise LataError(
            "LATACallback is for a Trainer of Lightning. The Trainer of transformers, and those of TRL, take LATATrainerCallback, with the same "
            "arguments: from lata_lightning.callbacks.transformers import LATATrainerCallback"
        )

    def _require_run(self) -> Run:
        if self.run is None:
            raise LataError("LATACallback was not set up: it has to be among the trainer's callbacks when fit is called")
        return self.run

    def _check_companions(self, trainer: pl.Trainer) -> None:
        """Refuse another callback of the same name or output directory."""
        others = [other for other in trainer.callbacks if isinstance(other, LATACallback) and other is not self]  # type: ignore[attr-defined]
        if any(other.name == self.name for other in others):
            raise LataError(
                f"LATACallbacks in one trainer must have different names, and two are called {self.name!r}: give one another name=…"
            )
        directory = self._require_run().directory
        if directory is not None and any(other.run is not None and other.run.directory == directory for other in others):
            raise OutputError(f"two LATACallbacks would write to {directory}; give each an output_dir of its own")

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, on_step: bool | None) -> None:
        """Measure and log; ``on_step`` is None where logging through the module is not allowed any more."""
        run = self._require_run()
        measured = run.measure(trainer.global_step)
        if not trainer.barebones and on_step is not None:
            shown = "alignment" if "alignment" in measured.figures else "task_norm"
            for key, value in measured.figures.items():
                # For monitors, and one figure for the progress bar: loggers get the figures below, with the step they belong to.
                pl_module.log(
                    f"{self.name}/{key}", value, prog_bar=key == shown, logger=False, on_step=on_step, on_epoch=not on_step, batch_size=1
                )
        if run.record(measured):
            # By the number of the last batch, as Lightning logs its own metrics; after the batch it counts one further.
            step = max(trainer.fit_loop.epoch_loop._batches_that_stepped - (on_step is not True), 0)
            log_measured(trainer.loggers, self.name, measured, step)
            log_heat_map(trainer.loggers, self.name, run.directory, step)

    def _finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure what training ended with, and export it."""
        run = self._require_run()
        if run.last_step != trainer.global_step or run.alignment is None or _ends_with_averages(trainer):
            self._measure(trainer, pl_module, on_step=None)
        run.export(trainer.global_step, trainer.current_epoch)
        if self.log_artifact and run.first_process and run.directory is not None:
            log_artifact(trainer.loggers, self.name, run.directory / VECTOR_NAME)


def _ends_with_averages(trainer: pl.Trainer) -> bool:
    """Whether the model ends with averaged weights, which are complete only after every other callback's ``on_train_end``."""
    averages = any(isinstance(callback, WeightAveraging | StochasticWeightAveraging) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    return averages and not trainer.strategy.restore_checkpoint_after_setup


def _epoch_was_passed_over(trainer: pl.Trainer) -> bool:
    """Whether an exception ended the run that is resumed after the last batch of an epoch: Lightning takes the epoch for done, without its end."""
    epochs = trainer.fit_loop.epoch_progress.current
    return trainer.fit_loop.epoch_loop.batch_progress.is_last_batch and epochs.ready == epochs.completed
