"""One run of training with a callback: how far it has got, and what happens at each stage of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from lata_lightning.alignment import Alignment
from lata_lightning.callbacks.arguments import RunArguments
from lata_lightning.callbacks.export_checks import check_exports
from lata_lightning.callbacks.handover import folder, write_exports
from lata_lightning.callbacks.plots import plot_run
from lata_lightning.callbacks.run_end import closing_lines, end_table, ranking_line
from lata_lightning.display.tables import show
from lata_lightning.live.fingerprints import Fingerprint
from lata_lightning.live.history import MeasuredStep, append_history, cut_history, read_history
from lata_lightning.live.monitor import STATE_VERSION, TaskVectorMonitor
from lata_lightning.live.weighing import weigh_run
from lata_lightning.store.head_files import Head
from lata_lightning.store.run_directory import HISTORY_NAME, VECTOR_NAME, begin_output, check_output, end_output, remove_partial_output
from lata_lightning.vectors.task_vector import TaskVector

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure


class Phase(IntEnum):
    """How far a run has got."""

    CAPTURED = 0
    """The model is set up. Its start weights are captured as far as it has any."""
    SETTLED = 1
    """The model has its final precision, and the start weights that belong to it."""
    ENTERED = 2
    """It is certain whether the run is fresh or resumed, and the output directory is ready."""
    TRAINING = 3
    """The first batch has begun."""
    EXPORTED = 4
    """The vector is written."""


class Loaded(NamedTuple):
    """What a checkpoint says of the run that wrote it; no fingerprint where it was written before the run had settled its start."""

    fingerprint: Fingerprint | None
    last_step: int | None


class Run:
    """A task vector from the first look at the model to its export.

    Every process has one. It knows nothing of the framework that trains: a callback calls it from its hooks, in the order of ``Phase``.

    Args:
        arguments: The arguments that the callback was given.
        root: The module that is trained.
        note: Takes remarks for the log; called on every process.
    """

    def __init__(self, arguments: RunArguments, root: nn.Module, note: Callable[[str], None]) -> None:
        self._arguments, self.note = arguments, note
        self.monitor = TaskVectorMonitor(
            root,
            arguments.instruction_vector,
            start=arguments.start,
            weighting=arguments.weighting,
            level=arguments.level,
            base_weights=arguments.base_weights,
            compare_with=arguments.compare_with,
            path=arguments.model,
            layers=arguments.layers,
            leave_out=arguments.leave_out,
            defer=True,
        )
        self.tracker = self.monitor.tracker
        self.phase = Phase.CAPTURED
        self.fresh = True
        self.directory: Path | None = None
        self.alignment: Alignment | None = None
        """The last measurement; with coefficients once the vector is written."""
        self.last_step: int | None = None
        """Optimizer steps at the last measurement, of this run or of the one it resumes."""
        self.epoch = 0
        """The epoch under way, from 0."""
        self._loaded: Loaded | None = None
        self._last_line: int | None = None

    @property
    def first_process(self) -> bool:
        """Whether this process writes and logs."""
        return self.tracker.ranks.rank == 0

    def go_on(self) -> None:
        """Begin another fit with the weights there are: the start stays what it was."""
        self.directory, self._loaded = None, None
        if self.phase is Phase.EXPORTED:
            self.phase = Phase.TRAINING if self.tracker.begun else Phase.ENTERED

    def capture(self) -> None:
        """Capture the weights tentatively, before a resumed run restores trained ones."""
        self.monitor.capture()

    def settle(self, check: Callable[[], None]) -> None:
        """Settle which weights are the start: the model has its final precision by now.

        Args:
            check: Refuses what else cannot be right, on every process.
        """
        tracker = self.tracker
        tracker.ranks.agree(check)
        self.monitor.settle(self.directory)
        self.note(f"start weights: {tracker.describe()}")
        if tracker.head.describe():
            self.note(tracker.head.describe())
        self.phase = Phase.SETTLED

    def state_dict(self) -> dict[str, Any]:
        """Return version, last measured step, and the fingerprint of the start weights; None before the start is certain."""
        return {"version": STATE_VERSION, "last_step": self.last_step, "fingerprint": dict(self.tracker.fingerprint) or None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the state of the run that is resumed."""
        loaded = Loaded(state.get("fingerprint"), state.get("last_step"))
        # The learning-rate and batch-size finders save and load once before a fresh run has started: that is no resume.
        if self._loaded is None or loaded.fingerprint is not None:
            self._loaded = loaded
        if loaded.fingerprint is not None:
            self.last_step = loaded.last_step

    def enter(self, *, resumes: bool) -> None:
        """Decide whether the run is fresh or resumed. A fresh one must not meet the output of another, a resumed one must have its first start weights.

        Args:
            resumes: Whether the trainer was given a checkpoint to resume from, if no state was loaded.
        """
        tracker = self.tracker
        recorded = None if self._loaded is None else self._loaded.fingerprint
        self.fresh = recorded is None and (self._loaded is not None or not resumes)
        tracker.ranks.agree(tracker.forget_frozen if self.fresh else lambda: tracker.take_up(recorded))
        tracker.note_fingerprint()
        if not self.fresh:
            tracker.verify(recorded)
        if self.directory is not None:
            self._prepare(self.directory)
        self._find_last_line()
        self.phase = Phase.ENTERED

    def take_up_history(self, step: int, epoch: int) -> None:
        """Cut the history where the checkpoint that is resumed leaves it."""
        if self.first_process and self.directory is not None:
            cut_history(self.directory / HISTORY_NAME, step)
        self.monitor.forget_after(step)
        self._find_last_line()
        self.epoch = epoch
        if self.last_step is None:
            self.last_step = step or None

    def before_batch(self, epoch: int) -> None:
        """Before the first step, look whether weights were loaded late; before any step, capture what was unfrozen since the last one."""
        self.epoch = epoch
        if self.phase < Phase.TRAINING:
            if self.fresh:
                self.tracker.ranks.agree(self.tracker.capture_late)
            self.tracker.begin()
            self.phase = Phase.TRAINING
        self.tracker.capture_unfrozen()

    def measure(self, step: int) -> MeasuredStep:
        """Measure the present weights; the same on every process."""
        self.tracker.capture_unfrozen()
        self.alignment, self.last_step = self.monitor.measure(step, self.epoch), step
        return self.monitor.history[-1]

    def measure_again(self, step: int) -> None:
        """Measure weights of an earlier step that were restored; the history has that step already, or never will."""
        self.monitor.forget_after(step)
        self.measure(step)

    def record(self, measured: MeasuredStep) -> bool:
        """Add a measurement to the history; False where it is there already, and on other processes than the first."""
        if not self.first_process or self._last_line == measured.step:
            return False
        if self.directory is not None:
            append_history(self.directory / HISTORY_NAME, measured)
        self._last_line = measured.step
        return True

    def export(self, step: int, epoch: int) -> None:
        """Write what training ended with, in every form that is wanted."""
        self.monitor.hand_over(self._write, self.alignment, step, epoch)
        self.phase = Phase.EXPORTED
        self.monitor.close()
        if self.first_process and self.directory is not None:
            end_output(self.directory)

    @property
    def exported(self) -> bool:
        """Whether everything that is wanted was written, by this run or by the one it resumes."""
        directory = self.directory
        written = directory is None or all((directory / folder(kind)).exists() for kind in self._arguments.export)
        return self.phase is Phase.EXPORTED or written

    def plot(self, ax: Axes | None = None) -> tuple[Figure | SubFigure, Axes]:
        """Draw the run (see ``plot_run``)."""
        rows = [] if self.directory is None else read_history(self.directory / HISTORY_NAME)
        return plot_run([(row["step"], row["epoch"], Alignment.from_json(row)) for row in rows], self.alignment, ax)

    def _prepare(self, directory: Path) -> None:
        """Make the output directory ready: empty for a fresh run, without half-written output for a resumed one."""
        tracker, kinds = self.tracker, self._arguments.export
        if self.fresh:
            results = dict.fromkeys((VECTOR_NAME, *map(folder, kinds)))
            remark = tracker.ranks.agree(lambda: check_output(directory, tracker.fingerprint, results))
            tracker.ranks.agree(lambda: check_exports(kinds, tracker, self.monitor.measurement))
            if remark is not None:
                self.note(remark)
        if self.first_process and self.fresh:
            begin_output(directory, tracker.fingerprint)
        elif self.first_process:
            remove_partial_output(directory)

    def _find_last_line(self) -> None:
        rows = read_history(self.directory / HISTORY_NAME) if self.directory is not None and self.first_process else []
        self._last_line = rows[-1]["step"] if rows else None

    def _write(self, vector: TaskVector, head: Head | None) -> None:
        """On the first process: weight the vector, show it, write it and a head that was left out of it, and say what to do with them."""
        arguments, instruction = self._arguments, self.monitor.measurement.instruction
        vector, handed_over = weigh_run(vector, arguments.weighting, instruction, threshold=arguments.threshold, outside=arguments.outside)
        self.alignment = vector.manifest.alignment or self.alignment
        if arguments.table and self.alignment is not None:
            figures = "alignment" if self.alignment.values else "norms"
            show(end_table(self.alignment, f"{arguments.name}: {figures} at step {vector.manifest.step}"))
        if self.directory is None:
            self.note(ranking_line(vector))
            return
        if head is not None:
            # Before the vector, which marks the run as finished.
            head.save(self.directory)
        write_exports(vector, handed_over, arguments.export, self.directory, dtype=arguments.dtype, instruction=instruction, note=self.note)
        given = arguments.instruction_vector
        saved = str(given) if isinstance(given, str | Path) else None
        for line in closing_lines(vector, handed_over, arguments.export, self.directory, instruction=saved, head=head is not None):
            self.note(line)
