"""The callback for the Trainer of transformers, and for those of TRL."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from lata_lightning.callbacks.following import RunCallback
from lata_lightning.callbacks.metrics import metrics_of
from lata_lightning.callbacks.run import Phase, Run
from lata_lightning.errors import LataError
from lata_lightning.live.monitor import check_version

_log = logging.getLogger("lata_lightning")
# Under these, accelerate replaces the parameters after the callback has seen them.
_SHARDING = {"FSDP": "ACCELERATE_USE_FSDP", "DeepSpeed": "ACCELERATE_USE_DEEPSPEED"}


class LATATrainerCallback(RunCallback, TrainerCallback):  # type: ignore[misc]
    """Measure the task vector while transformers' Trainer or a trainer of TRL trains it, and export it with its layer coefficients at the end.

    Takes the arguments of ``LATACallback``, with the same meaning. ``output_dir`` is by default a folder named after ``name`` in the Trainer's own
    output directory. Training is bit for bit what it would be without the callback.

    The start is what the model has when the Trainer is made. A run that is resumed (``resume_from_checkpoint``) goes on with the start of the first
    one. That is read from the model as your script builds it, before the Trainer restores the checkpoint, and compared with a fingerprint in
    ``trainer_state.json``. With ``load_best_model_at_end`` the vector is that of the best checkpoint, and so is the step it is saved under.

    Logged through the Trainer, once it is known (``callback.log_to(trainer)``), so by all loggers of ``report_to``, on the console and in
    ``trainer.state.log_history``:

    =========================================== ===============================================================
    key                                         value
    =========================================== ===============================================================
    ``{name}/{figure}``                         the figures of ``LATACallback``
    ``{name}_layers/{figure}/{layer}``          the same of each layer
    =========================================== ===============================================================

    Whether or not it is, ``history.jsonl`` in the output directory lists all figures.

    State, in ``trainer_state.json`` of each checkpoint under ``stateful_callbacks``, some 50 bytes per tensor: ``version``, ``last_step`` and
    ``fingerprint``, as in a checkpoint of ``LATACallback``.

    Works on one device and under DDP. FSDP and DeepSpeed are refused: accelerate replaces the parameters after the callback has seen them.

    Raises:
        LataError: An argument has no meaning; the start weights of a resumed run cannot be known; the model is sharded by accelerate.

    Source: LATA, arXiv:2502.20186.
    """

    _trainer: Any = None

    def log_to(self, trainer: Any) -> None:
        """Log through a Trainer from now on. A Trainer tells its callbacks everything but where it logs."""
        self._trainer = trainer

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        """Capture the weights: this is the last event before a resumed run restores trained ones."""
        if model is not None:
            self._new_run(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Settle which weights are the start, and take up the state of the run that is resumed."""
        if self.log_artifact:
            raise LataError("log_artifact=True needs a WandbLogger of Lightning; the Trainer of transformers has none. Leave it out.")
        asked_for = {"FSDP": args.fsdp, "DeepSpeed": args.deepspeed}
        sharded = [name for name, variable in _SHARDING.items() if asked_for[name] or os.environ.get(variable) == "true"]
        if sharded:
            raise LataError(
                f"LATATrainerCallback cannot follow a model that accelerate shards ({', '.join(sharded)}). Train with Lightning and LATACallback, or "
                "train without the callback, save the model, and take the vector from that: lata extract START MODEL --output VECTOR"
            )
        run = self.run
        if run is None or run.phase is not Phase.CAPTURED or run.tracker.root is not model:
            # Trained again, or built anew for this training by model_init.
            run = self._new_run(model)
        run.directory = Path(self.output_dir or Path(args.output_dir) / self.name)
        run.settle(lambda: self._check_companions(state, run))
        recorded = state.stateful_callbacks.get(self._key) if state.global_step else None
        if recorded is not None:
            check_version(recorded, "LATATrainerCallback")
            run.load_state_dict(recorded)
        run.enter(resumes=state.global_step > 0)
        epoch = _epoch(state)
        run.take_up_history(state.global_step, epoch)
        self._note_state(state, run)
        if _between_epochs(state) and run.last_step not in (None, state.global_step) and self.epoch_due(epoch):
            # The checkpoint was written at the last step of an epoch, before its end was measured, and the Trainer takes the epoch for done.
            self._measure(state, control)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Capture what can change from now on."""
        self._require_run().before_batch(math.floor(state.epoch or 0))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Capture what was unfrozen by a callback that came after this one."""
        self._require_run().tracker.capture_unfrozen()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure when another ``every_n_train_steps`` optimizer steps are done."""
        if self.step_due(state.global_step, self._require_run().last_step):
            self._measure(state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure at the end of every ``every_n_epochs``-th epoch."""
        if self.epoch_due(self._require_run().epoch):
            self._measure(state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure once more if the weights are not those that were measured last, then export."""
        run, step = self._require_run(), state.global_step
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            step = state.best_global_step
            run.measure_again(step)
            run.note(f"the vector is that of step {step}, which load_best_model_at_end has restored")
        elif run.last_step != step or run.alignment is None:
            self._measure(state, control)
        run.export(step, _epoch(state) + 1)

    @property
    def state_key(self) -> str:
        """Refuse a Trainer of Lightning, which asks for this before it calls a hook.

        Raises:
            LataError: Always.
        """
        raise LataError(
            "LATATrainerCallback is for the Trainer of transformers. A Trainer of Lightning takes LATACallback, with the same arguments: "
            "from lata_lightning import LATACallback"
        )

    def setup(self, *args: Any, **kwargs: Any) -> None:
        """Hook of Lightning, see ``state_key``."""

    def on_exception(self, *args: Any, **kwargs: Any) -> None:
        """Hook of Lightning, see ``state_key``."""

    @property
    def _key(self) -> str:
        return f"LATATrainerCallback:{self.name}"

    def _new_run(self, model: nn.Module) -> Run:
        self.run = Run(self, model, _note)
        self.run.capture()
        return self.run

    def _require_run(self) -> Run:
        if self.run is None:
            raise LataError("LATATrainerCallback was not set up: add it to the Trainer before train is called")
        return self.run

    def _check_companions(self, state: Any, run: Run) -> None:
        """Refuse another callback of the same name or output directory; each has left a note of its own in a fresh state."""
        if state.global_step:
            return
        others = {key: noted for key, noted in state.stateful_callbacks.items() if key.startswith("LATATrainerCallback:")}
        if self._key in others:
            raise LataError(
                f"callbacks in one Trainer must have different names, and two are called {self.name!r}: give one another name=…"
            )
        if any(noted["directory"] == str(run.directory) for noted in others.values()):
            raise LataError(f"two callbacks would write to {run.directory}; give each an output_dir of its own")

    def _note_state(self, state: Any, run: Run) -> None:
        """Leave the state of the run where the Trainer writes it to each checkpoint."""
        state.stateful_callbacks[self._key] = {**run.state_dict(), "fingerprint": run.tracker.fingerprint, "directory": str(run.directory)}

    def _measure(self, state: Any, control: Any) -> None:
        run = self._require_run()
        measured = run.measure(state.global_step)
        run.record(measured)
        self._note_state(state, run)
        if self._trainer is not None:
            from transformers import Trainer

            # Logging resets the flag, and what the Trainer has to log itself may still be due. A trainer's own version would add averages of its own, over
            # fewer steps than it means to.
            due = control.should_log
            Trainer.log(self._trainer, metrics_of(self.name, measured))
            control.should_log = due


def _note(remark: str) -> None:
    _log.info("LATATrainerCallback: %s", remark)


def _epoch(state: Any) -> int:
    """Return the number of the epoch that the last step belongs to, from 0."""
    return max(math.ceil((state.epoch or 0.0) - 1e-9) - 1, 0)


def _between_epochs(state: Any) -> bool:
    return bool(state.epoch) and math.isclose(state.epoch, round(state.epoch), abs_tol=1e-9)
