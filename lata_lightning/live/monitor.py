"""The task vector of a model in any training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from lata_lightning.alignment import Alignment, alignment_of
from lata_lightning.errors import LataError, first_three
from lata_lightning.layers import LayerRule, Level, check_level
from lata_lightning.live.comparing import open_vectors
from lata_lightning.live.form import Form, check_form, form_of
from lata_lightning.live.gathering import export, manifest_of
from lata_lightning.live.history import COSINE, MeasuredStep, summary, write_history
from lata_lightning.live.measuring import Measurement
from lata_lightning.live.new_heads import head_of
from lata_lightning.live.tracker import Tracker
from lata_lightning.live.weighing import DEFAULT_RULE, open_instruction, weigh_run
from lata_lightning.moments import Start, check_start, total
from lata_lightning.store.dtypes import float_dtype
from lata_lightning.store.head_files import Head
from lata_lightning.store.names import LeaveOut
from lata_lightning.store.run_directory import SPILL_NAME
from lata_lightning.vectors.task_vector import TaskVector
from lata_lightning.weighting import DEFAULT_THRESHOLD, Rule, Weighting, rule_name

STATE_VERSION = 1
_Result = TypeVar("_Result")


class TaskVectorMonitor:
    """Measure the task vector of a model while any loop trains it, and save it.

    The weights that the model has when the monitor is made are the start. So make it when the model is loaded, cast, sharded and on its device, after
    the process group is set up, and before a checkpoint is restored into the model. The weights in training are only read: training is bit for bit
    what it would be without the monitor. Every process makes a monitor, and calls each of its methods.

    Args:
        model: Any module; wrappers of DDP, FSDP2, Fabric and torch.compile may be around it or inside of it.
        instruction_vector: A saved instruction vector, or a pair (base, instruct) of models to take the difference of. Without one only norms are
            measured.
        start: What the fine-tune starts from: ``"instruct"`` or ``"base"``.
        weighting: Rule for the coefficients of the saved vector: ``"linear"``, ``"log"``, ``"threshold"`` or ``"none"``, or a function from the
            alignment to the coefficient by layer. ``"linear"`` if none is given.
        level: Unit of the layers: ``"block"``, ``"submodule"`` or ``"tensor"``.
        base_weights: How the start weights are stored: ``"auto"``, ``"lora"``, ``"source"``, ``"spill"`` or ``"memory"``, as for ``LATACallback``; any
            other text is a directory or checkpoint that has them.
        spill_to: Directory for the start weights, with ``base_weights="spill"``.
        compare_with: Saved vectors by a name of your choice. The cosine of the task vector with each is measured, too.
        threshold: For the rule ``"threshold"``.
        outside: Coefficient of the tensors that belong to no layer.
        path: Path of the model that is meant, where the module has several, as ``"actor"``.
        layers: Rule that names the blocks, for modules of no known layout (see ``layer_map``).
        leave_out: Regular expressions, searched in tensor names: what matches is neither measured nor saved.
        defer: Capture the weights as far as there are any, and leave it to ``settle`` to complete the start. For trainers that build, cast or wrap the
            model after the first look at it.

    Attributes:
        history: The measurements, oldest first; each has ``step``, ``epoch``, ``figures``, ``alignment`` and ``cosines``.

    Raises:
        LataError: An argument has no meaning, or the model cannot be measured.
        LayoutMismatchError: A vector does not fit the model.
        SourceError: A vector cannot be read.

    Source: LATA, arXiv:2502.20186.
    """

    def __init__(
        self,
        model: nn.Module,
        instruction_vector: tuple[str, str] | str | Path | TaskVector | None = None,
        *,
        start: Start = "instruct",
        weighting: Weighting | Rule | None = None,
        level: Level = "block",
        base_weights: str = "auto",
        spill_to: str | Path | None = None,
        compare_with: Mapping[str, str | Path | TaskVector] | None = None,
        threshold: float = DEFAULT_THRESHOLD,
        outside: float = 0.0,
        path: str | None = None,
        layers: LayerRule | str | None = None,
        leave_out: Sequence[str] = (),
        defer: bool = False,
    ) -> None:
        rule_name(weighting or DEFAULT_RULE)
        if base_weights == "spill" and spill_to is None and not defer:
            raise LataError("base_weights='spill' needs a directory for the start weights: spill_to=…")
        self.start, self.level, self.weighting = check_start(start), check_level(level), weighting
        self.threshold, self.outside = threshold, outside
        self.tracker = Tracker(model, model=path, base_weights=base_weights, layers=layers, leave_out=LeaveOut(leave_out))
        self.measurement = Measurement(self.tracker, open_instruction(instruction_vector), start, open_vectors(compare_with))
        self.history: list[MeasuredStep] = []
        self._form: Form = {}
        self._left_spilled = False
        if not defer:
            self.capture()
            self.settle(spill_to)
            # What an interrupted run has left is taken up by load_state_dict, or is in the way.
            self._left_spilled = spill_to is not None and (Path(spill_to) / SPILL_NAME).is_dir()
            if not self._left_spilled:
                self.tracker.begin()

    @property
    def alignment(self) -> Alignment | None:
        """The alignment that was measured last; None before the first measurement."""
        return self.history[-1].alignment if self.history else None

    @property
    def last_step(self) -> int | None:
        """Optimizer steps at the last measurement; None before the first."""
        return self.history[-1].step if self.history else None

    def capture(self) -> None:
        """Capture the weights that there are. The constructor does so; with ``defer=True`` call it before a checkpoint is restored."""
        self.tracker.ranks.agree(self.tracker.capture_early)

    def settle(self, spill_to: str | Path | None = None) -> None:
        """Complete the start, now that the model has its final form. The constructor does so; with ``defer=True`` call it before the first step.

        Args:
            spill_to: As for the constructor.
        """
        tracker = self.tracker
        tracker.ranks.agree(lambda: tracker.settle(None if spill_to is None else Path(spill_to)))
        self._form = form_of(tracker.live)
        self.measurement.check(self.level, weighted=self.weighting != "none")

    def capture_unfrozen(self) -> None:
        """Capture layers that were unfrozen. Call it after you unfreeze layers in the middle of training, before the next step."""
        self.tracker.look()
        self.tracker.capture_unfrozen()

    def measure(self, step: int, epoch: int | None = None) -> Alignment:
        """Measure the present weights, and add the measurement to the history.

        Args:
            step: Optimizer steps done by now; not fewer than at the last measurement. A second measurement of a step replaces the first.
            epoch: The epoch under way, from 0, where there are epochs.

        Returns:
            Alignment and norms by layer, the same on every process. Without an instruction vector only the norms are defined.

        Raises:
            LataError: The model is no longer what it was when the start was settled: cast, sharded, unfrozen and trained unseen.
            CorruptFileError: A sum is not finite: training diverged.
        """
        if self.last_step is not None and step < self.last_step:
            raise LataError(
                f"steps must not go back: step {step} was to be measured after step {self.last_step}. Give the number of optimizer steps done."
            )
        measured = self._measured(step, epoch)
        self.forget_after(step - 1)
        self.history.append(measured)
        return measured.alignment

    def forget_after(self, step: int) -> None:
        """Drop the measurements after a step, which a loop that goes back to an earlier checkpoint is about to take again."""
        self.history = [measured for measured in self.history if measured.step <= step]

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint has to store so that a resumed loop goes on with the same start; some 50 bytes per tensor, and the history.

        Plain types only, so ``torch.load(weights_only=True)`` and JSON can read it: ``version``, ``last_step``, ``fingerprint`` (two sums over the bits
        of each start tensor) and ``history``.
        """
        return {
            "version": STATE_VERSION,
            "last_step": self.last_step,
            "fingerprint": dict(self.tracker.fingerprint) or None,
            "history": [measured.to_json() for measured in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the start and the history of the loop that is resumed.

        The monitor must have been made when the model was built as at the first start, before the weights of the checkpoint were restored into it, unless
        ``base_weights`` names the start weights. Whether they are restored by now makes no difference.

        Raises:
            LataError: The start weights are not those of the first start, or the state is of a later version.
        """
        check_version(state, "monitor")
        recorded = state.get("fingerprint")
        self.tracker.ranks.agree(lambda: self.tracker.take_up(recorded))
        self.tracker.note_fingerprint()
        self.tracker.verify(recorded)
        self.tracker.begin()
        self._left_spilled = False
        self.history = [MeasuredStep.from_json(row) for row in state.get("history") or ()]

    def save(self, path: str | Path, *, step: int | None = None, dtype: str = "float32") -> None:
        """Write the task vector that the model has gained by now, with the coefficients of its layers.

        The present weights are measured once more, and that is not added to the history. Of a classifier with a new head, the head goes into the same
        directory. Rank zero writes, and one tensor at a time is gathered.

        Args:
            path: A directory that does not exist yet, or is empty. It appears complete or not at all.
            step: Optimizer steps done by now; by default that of the last measurement, if the weights are still those.
            dtype: Precision to store: ``float32``, ``bfloat16`` or ``float16``.

        Raises:
            LataError: The dtype is unknown, or as for ``measure``.
            OutputError: The path exists, or the disk is full.
        """
        float_dtype(dtype)
        measured = self._measured(step or 0, None)
        last = self.history[-1] if self.history else None
        if step is None and last is not None and (last.figures, last.alignment) == (measured.figures, measured.alignment):
            step = last.step

        def write(vector: TaskVector, head: Head | None) -> None:
            weighted, _ = weigh_run(vector, self.weighting, self.measurement.instruction, threshold=self.threshold, outside=self.outside)
            weighted.save(path, dtype=dtype)
            if head is not None:
                head.save(Path(path))

        self.hand_over(write, measured.alignment, step, last.epoch if last is not None and last.step == step else None)

    def save_history(self, path: str | Path) -> None:
        """Write the history as JSON Lines, one measurement a line, which ``lata report`` reads beside the vector as ``history.jsonl``."""
        if self.tracker.ranks.rank == 0:
            write_history(Path(path), [measured.to_json() for measured in self.history])

    def hand_over(
        self, write: Callable[[TaskVector, Head | None], _Result], alignment: Alignment | None, step: int | None, epoch: int | None
    ) -> _Result | None:
        """Give the vector, and a head that was left out of it, to a function on rank zero, while the other processes deliver their parts.

        Args:
            write: Reads the vector tensor by tensor, each of which is gathered then.
            alignment: What was measured of the present weights.
            step: Optimizer steps done.
            epoch: The epoch under way.

        Returns:
            What ``write`` returned; None on other processes.
        """
        tracker = self.tracker
        tracker.ranks.agree(tracker.start_weights.check_origin)
        known = alignment if self.measurement.instruction is not None else None
        manifest = manifest_of(tracker, self.start, known, step, epoch)
        head = head_of(tracker.look(), tracker.head.names, tracker.location)
        return tracker.ranks.agree(lambda: export(tracker, lambda vector: write(vector, head), manifest))

    def close(self) -> None:
        """Remove start weights that were spilled to files: after this nothing can be measured any more."""
        if self.tracker.ranks.rank == 0:
            self.tracker.start_weights.close()

    def _check_form(self) -> None:
        """Refuse a model whose start values do not belong to its present form any more."""
        tracker = self.tracker
        tracker.ranks.agree(lambda: check_form(self._form, tracker.look(), tracker.ranks))
        unseen = tracker.unfrozen_unseen()
        if unseen:
            raise LataError(
                f"tensors were unfrozen, and may have been trained, before their start values were captured: {first_three(unseen)}. Call "
                "capture_unfrozen() after you unfreeze layers and before the next step."
            )

    def _measured(self, step: int, epoch: int | None) -> MeasuredStep:
        if self._left_spilled:
            raise LataError(
                "the directory for the start weights has those of another run. To go on with that run, give its state to load_state_dict; otherwise "
                "remove them, or give another spill_to."
            )
        tracker = self.tracker
        self._check_form()
        moments, inner = self.measurement.sums()
        alignment = alignment_of(moments, tracker.positions, self.level, self.start)
        compared = self.measurement.comparison.cosines(moments, inner, tracker.positions, self.level)
        whole = {f"{COSINE}{other}": cosines.whole for other, cosines in compared.items() if cosines.whole is not None}
        figures = summary(total(moments.values()), alignment, self.measurement.instruction is not None) | whole
        return MeasuredStep(step, epoch, figures, alignment, {other: cosines.layers for other, cosines in compared.items()})


def check_version(state: Mapping[str, Any], what: str) -> None:
    """Refuse a state that a later release has written.

    Raises:
        LataError: It is of a later version.
    """
    version = state.get("version", STATE_VERSION)
    if version > STATE_VERSION:
        raise LataError(f"the checkpoint's {what} state is of version {version}, this release reads up to {STATE_VERSION}. Upgrade it.")
