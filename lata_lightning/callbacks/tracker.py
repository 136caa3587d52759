"""The work behind the callback, on one process: start weights, live weights and instruction vector held together."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lata_lightning.alignment import Alignment
from lata_lightning.callbacks.live_model import LiveModel, look_at
from lata_lightning.callbacks.start_weights import StartWeights
from lata_lightning.errors import BaseMismatchError, LataError, LayoutMismatchError, WeightingError, first_three
from lata_lightning.layers import LayerMap, LayerRule, Level, layer_map
from lata_lightning.moments import Start, moments_table, tensor_sums
from lata_lightning.store.differences import Difference
from lata_lightning.store.hashing import content_hash
from lata_lightning.store.manifest import Identity, Manifest, TensorEntry
from lata_lightning.store.pairing import pair
from lata_lightning.store.sources import open_source
from lata_lightning.store.task_vector import TaskVector

IN_MEMORY = ("auto", "memory")
_ADVICE = "Pass base_weights=<directory or checkpoint of the start weights>."


class Tracker:
    """Measures the difference between a module in training and the weights it started from.

    Args:
        root: The LightningModule.
        model: Path of the model inside of it; None to look for it.
        instruction: Instruct minus base, or None.
        start: What the fine-tune starts from.
        base_weights: ``auto`` or ``memory`` for copies, else where the start weights lie.
        layers: Rule that names the blocks.
    """

    def __init__(
        self,
        root: nn.Module,
        *,
        model: str | None = None,
        instruction: TaskVector | None = None,
        start: Start = "instruct",
        base_weights: str = "auto",
        layers: LayerRule | str | None = None,
    ) -> None:
        self._root, self._model = root, model
        self.instruction, self._start, self._base_weights, self._rule = instruction, start, base_weights, layers
        self._kept: StartWeights | None = None
        self._squares: dict[str, float] = {}
        self.places = LayerMap({}, ())

    @property
    def captured(self) -> bool:
        """Whether there are start weights; on ranks other than zero there never are."""
        return self._kept is not None

    @property
    def kept(self) -> StartWeights:
        """The start weights."""
        if self._kept is None:
            raise LataError("there are no start weights: the model had no weights when the fit started")
        return self._kept

    def capture_early(self) -> None:
        """Keep the weights as they are before a resumed run restores trained ones; nothing if the model has none yet."""
        live = look_at(self._root, self._model)
        if live.materialized:
            self._kept = self._keep(live)
            self._kept.capture(live.changing)

    def settle(self, recorded: Mapping[str, str] | None, *, resumed: bool) -> None:
        """Decide which weights are the start, now that the model has its final precision.

        Args:
            recorded: Fingerprint of the start weights in the checkpoint that is resumed.
            resumed: Whether the live weights are trained ones.
        """
        live = look_at(self._root, self._model)
        _refuse_unreadable(live)
        if self._kept is None:
            self._kept = self._keep(live)
        kept = self._kept
        kept.follow(live)
        kept.release(kept.changing - set(live.changing))
        kept.cast()
        kept.capture(name for name in live.changing if name not in kept.changing)
        if resumed and self._base_weights in IN_MEMORY:
            _verify(kept, recorded)
        started = [name for name in live.adapted if not resumed and live.added(name).any()]
        if started:
            raise LataError(
                f"an adapter must add nothing when training starts; these do, by their initialisation or from earlier training: {first_three(started)}. "
                "Merge the adapter into its model first, or use the default initialisation of LoRA."
            )
        self.places = layer_map(live.names, structure=live.module, rule=self._rule)

    def check_instruction(self, level: Level, *, weighted: bool) -> None:
        """Refuse an instruction vector of another layout, or one that is zero in a layer that is to be weighted."""
        if self.instruction is None:
            return
        live = self.kept.live
        matched, _ = pair(live, self.instruction.tensors)
        missing = set(live.names) - set(matched.names)
        if missing:
            raise LayoutMismatchError(f"the instruction vector {self.instruction.label} lacks {first_three(missing)}")
        self._squares = {name: row.task for name, row in moments_table({n: tensor_sums(self.instruction[n]) for n in live.names}).items()}
        layers = self.places.layers(level)
        empty = [layer for layer, names in layers.items() if not any(self._squares[name] for name in names)]
        if empty and weighted:
            raise WeightingError(
                f"the instruction vector is zero in {first_three(empty)} of {len(layers)} layers, so they have no alignment to be weighted by. "
                "Use a coarser level, or weighting='none'."
            )

    def capture_late(self) -> None:
        """Before the first step of a fresh run: take weights that were loaded since as the start, and say so."""
        self.kept.follow(look_at(self._root, self._model))
        changed = self.kept.changed()
        if changed and self._base_weights not in IN_MEMORY:
            raise BaseMismatchError(
                f"the model does not start from {self._base_weights}: it has other values in {first_three(changed)}. Pass the weights it starts from."
            )
        if changed:
            rank_zero_warn(
                f"weights were loaded after the fit had started ({first_three(changed)}); LATACallback takes those as the start weights"
            )
            self.kept.capture(changed)

    def capture_unfrozen(self) -> None:
        """Keep tensors that can change from now on; as they could not before, they still have their start values."""
        kept = self.kept
        kept.capture(name for name in kept.live.changing if name not in kept.changing)

    def sums(self) -> tuple[list[str], Tensor]:
        """Names and their three sums, float64 of shape (tensors, 3), on the CPU."""
        kept = self.kept
        kept.follow(look_at(self._root, self._model))
        rows = [self._sums_of(name, kept) for name in kept.names]
        return list(kept.names), torch.stack(rows)

    def task_vector(self, alignment: Alignment | None, step: int, epoch: int) -> TaskVector:
        """Tuned minus start as it stands now."""
        kept = self.kept
        kept.follow(look_at(self._root, self._model))
        hashes = kept.fingerprint()
        frozen = {name: hashes[name] for name in kept.names if name not in kept.changing}
        manifest = Manifest(
            kind="task",
            start=self._start,
            layers=self.places,
            start_identity=Identity(kept.location, content_hash=content_hash(hashes)),
            alignment=alignment,
            step=step,
            epoch=epoch,
            tensors={name: TensorEntry(kept.shape(name), "float32", unchanged=True) for name in frozen},
        )
        return TaskVector(_LiveDifference(kept, frozen), manifest)

    def _keep(self, live: LiveModel) -> StartWeights:
        if self._base_weights in IN_MEMORY:
            return StartWeights(live)
        matched, origin = pair(live, open_source(self._base_weights))
        missing = set(live.names) - set(matched.names)
        if missing:
            raise LayoutMismatchError(f"the start weights {self._base_weights} lack {first_three(missing)}")
        return StartWeights(live, origin)

    def _sums_of(self, name: str, kept: StartWeights) -> Tensor:
        instruction = self.instruction
        if name in kept.changing:
            # Without an instruction vector there is nothing to take off, whatever the start was.
            start: Start = self._start if instruction is not None else "instruct"
            direction = None if instruction is None else instruction[name]
            if name in kept.live.adapted:
                return tensor_sums(kept.live.added(name), direction, start=start).cpu()
            return tensor_sums(kept.live.read(name), direction, subtract=kept.read(name), start=start).cpu()
        square = self._squares.get(name, 0.0)
        # Frozen, so the difference is zero; from base, that means the task vector takes the whole instruction vector back.
        row = [0.0, 0.0, square] if self._start == "instruct" else [-square, square, square]
        return torch.tensor(row, dtype=torch.float64)


class _LiveDifference(Difference):
    """Live minus start weights; of a tensor under an adapter, what the adapter adds, without a detour over the sum."""

    def __init__(self, kept: StartWeights, known: Mapping[str, str]) -> None:
        super().__init__(kept, kept.live, kept.names, known=known)
        self._live = kept.live

    def read(self, name: str) -> Tensor:
        if name in self._live.adapted:
            return self._live.added(name).cpu().to(self.dtype(name))
        return super().read(name)


def _verify(kept: StartWeights, recorded: Mapping[str, str] | None) -> None:
    if recorded is None:
        raise LataError(
            f"this run resumes from a checkpoint that holds no state of LATACallback, so the weights it first started from are unknown. {_ADVICE}"
        )
    now = kept.fingerprint()
    wrong = [name for name in kept.changing if recorded.get(name) != now[name]]
    if wrong:
        raise LataError(
            "the weights this run first started from cannot be had any more: the model was built with other values than at the first start in "
            f"{first_three(wrong)} of {len(kept.changing)} tensors. {_ADVICE}"
        )


def _refuse_unreadable(live: LiveModel) -> None:
    if any(isinstance(live.read(name), DTensor) for name in live.names):
        raise LataError("LATACallback cannot measure DTensors, whose entries are spread over devices; use one device or strategy='ddp'")
