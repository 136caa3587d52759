"""The arguments that all callbacks take which follow a task vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from lata_lightning.callbacks.handover import check_kinds
from lata_lightning.errors import LataError
from lata_lightning.layers import LayerRule, Level, check_level
from lata_lightning.live.comparing import check_names
from lata_lightning.live.weighing import DEFAULT_RULE
from lata_lightning.moments import Start, check_start
from lata_lightning.store.dtypes import float_dtype
from lata_lightning.store.names import LeaveOut
from lata_lightning.vectors.task_vector import TaskVector
from lata_lightning.weighting import DEFAULT_THRESHOLD, Rule, Weighting, rule_name


class RunArguments:
    """What a callback is given, checked when it is made. ``LATACallback`` says what each argument means.

    Raises:
        LataError: An argument has no meaning.
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
        compare_with: Mapping[str, str | Path | TaskVector] | None = None,
        threshold: float = DEFAULT_THRESHOLD,
        outside: float = 0.0,
        model: str | None = None,
        layers: LayerRule | str | None = None,
        leave_out: Sequence[str] = (),
        dtype: str = "float32",
        table: bool = True,
        log_artifact: bool = False,
        name: str = "lata",
    ) -> None:
        if every_n_epochs < 0 or (every_n_train_steps is not None and every_n_train_steps < 1):
            steps = "" if every_n_train_steps is None else f" and {every_n_train_steps}"
            raise LataError(f"every_n_epochs must be at least 0 and every_n_train_steps at least 1, got {every_n_epochs}{steps}")
        float_dtype(dtype)
        rule_name(weighting or DEFAULT_RULE)
        self.instruction_vector = instruction_vector
        self.start, self.weighting, self.level = check_start(start), weighting, check_level(level)
        self.every_n_epochs, self.every_n_train_steps = every_n_epochs, every_n_train_steps
        self.base_weights, self.output_dir, self.export = base_weights, output_dir, check_kinds(export)
        self.compare_with = check_names(compare_with)
        self.threshold, self.outside = threshold, outside
        self.model, self.layers, self.leave_out = model, layers, LeaveOut(leave_out).patterns
        self.dtype, self.table, self.name = dtype, table, name
        if log_artifact and "vector" not in self.export:
            raise LataError("log_artifact=True sends the saved vector, and export leaves it out: add 'vector' to it")
        self.log_artifact = log_artifact

    def epoch_due(self, epoch: int) -> bool:
        """Whether the end of an epoch is measured; epochs are counted from 0."""
        return self.every_n_epochs > 0 and (epoch + 1) % self.every_n_epochs == 0

    def step_due(self, step: int, last_step: int | None) -> bool:
        """Whether another ``every_n_train_steps`` optimizer steps are done since the step that was measured last."""
        every = self.every_n_train_steps
        # Compared in multiples, as several optimizers advance the step by more than one.
        return every is not None and step // every > (last_step or 0) // every
