"""The weights of a model in training beside those it started from, on each process of a run."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Set
from math import prod
from pathlib import Path

import torch
from torch import nn

from lata_lightning.errors import BaseMismatchError, LataError, first_three
from lata_lightning.layers import STATISTICS, LayerMap, LayerPosition, LayerRule, layer_map
from lata_lightning.live.adapters import LoraModel, look_at
from lata_lightning.live.live_model import LiveModel
from lata_lightning.live.new_heads import NO_HEAD, new_head
from lata_lightning.live.placements import check_counted_once
from lata_lightning.live.ranks import Ranks
from lata_lightning.live.start_weights import PROVIDERS, SPILL_NAME, StartWeights, origin_of
from lata_lightning.numerics.low_rank import LowRank
from lata_lightning.numerics.measure import same_values
from lata_lightning.store.hashing import value_sums
from lata_lightning.store.names import NOTHING, LeaveOut
from lata_lightning.store.sources import TensorSource

_BUFFER = LayerPosition(None, STATISTICS)
_ADVICE = "Pass base_weights=<directory or checkpoint of the start weights>, or train with base_weights='spill' from the start."
Fingerprint = Mapping[str, list[int]]


class Tracker:
    """Follows a module in training: knows which weights it started from, which of its tensors can change, and what this process counts of them.

    Every process of a run has one. Tensors that all processes hold alike are shared out among them by name; of sharded tensors each process
    counts its own part.

    Args:
        root: The LightningModule.
        model: Path of the model inside of it; None to look for it.
        base_weights: How the start weights are kept: one of ``PROVIDERS``, or where they lie.
        layers: Rule that names the blocks.
        leave_out: What is neither followed nor measured.
    """

    def __init__(
        self,
        root: nn.Module,
        *,
        model: str | None = None,
        base_weights: str = "auto",
        layers: LayerRule | str | None = None,
        leave_out: LeaveOut = NOTHING,
    ) -> None:
        self.root, self._model, self.leave_out = root, model, leave_out
        self.head = NO_HEAD
        """Head of a classifier that its start does not hold, which is left out, too."""
        self._base_weights, self._rule = base_weights, layers
        self.ranks = Ranks()
        self._live: LiveModel | None = None
        self._kept: StartWeights | None = None
        self._changing: set[str] = set()
        # What adapters add when training starts, where that is not zero: by their initialisation, or from earlier training.
        self._start_factors: dict[str, LowRank] = {}
        self._spill_to: Path | None = None
        self._frozen: dict[str, list[int]] = {}
        self._moved: set[str] = set()
        self.positions = LayerMap({}, ())
        self.fingerprint: dict[str, list[int]] = {}
        """Two sums over the bits of every start value, by tensor: the same for every number of processes."""

    @property
    def live(self) -> LiveModel:
        """The model as it was when last looked at."""
        if self._live is None:
            raise LataError("there are no start weights: the model had no weights when the fit started")
        return self._live

    @property
    def kept(self) -> StartWeights:
        """The start weights this process keeps."""
        if self._kept is None:
            raise LataError("there are no start weights: the model had no weights when the fit started")
        return self._kept

    @property
    def changing(self) -> Set[str]:
        """Names of the tensors whose start values are kept, by this process or another; not to be changed."""
        return self._changing

    def capture_early(self) -> None:
        """Keep the weights as they are before a resumed run restores trained ones; nothing if the model has none yet."""
        self._find_head()
        live = look_at(self.root, self._model, self.leave_out)
        if live.materialized:
            self._live = live
            self._kept = self._new_kept()
            self._capture(live.changing)
            if not live.adapted:
                # What is frozen now may have been trained before the checkpoint that is resumed.
                for name in live.names:
                    if name not in self._changing and self.counts(name):
                        self._kept.find(name, live.shard(name))

    def settle(self, spill_to: Path | None) -> None:
        """Go through the start weights once more, now that the model has its final precision.

        Args:
            spill_to: Output directory of the run, for spilled start weights.
        """
        self._find_head()
        live, self._spill_to = self.look(), spill_to
        if not live.materialized:
            raise LataError(
                "the model has no weights when the fit starts; build them in __init__, configure_model or setup, and run lazy layers once there"
            )
        self.leave_out.check_used([*live.names, *live.left_out], "the model in training")
        if self._kept is None:
            self._kept = self._new_kept()
        for name in self._changing:
            self._kept.cast(name, live.dtype(name))
            if name in self._start_factors:
                self._start_factors[name] = self._start_factors[name].stored_as(live.added(name).parts[0].left.dtype)
        self._capture(name for name in live.changing if name not in self._changing)
        self._check_provider(live)
        shards = {name: live.shard(name) for name in live.names if name not in live.quantised}
        check_counted_once(shards, self.counts, {name: prod(live.shape(name)) for name in shards}, self.ranks)
        layers = layer_map([name for name in live.names if name not in live.buffers], structure=live.module, rule=self._rule)
        self.positions = LayerMap({name: layers.positions.get(name, _BUFFER) for name in live.names}, layers.blocks)

    def describe(self) -> str:
        """How the start weights are kept, for the log."""
        spilled = self._base_weights == "spill" and self._spill_to is not None
        return self.kept.describe(self.live, self._spill_to / SPILL_NAME if spilled and self._spill_to is not None else None)

    def take_up(self, recorded: Fingerprint | None) -> None:
        """On a resumed run: keep what the first run has kept, its spilled start weights before those that were kept since.

        Args:
            recorded: The fingerprint in the checkpoint; None if that holds none.
        """
        if self._base_weights == "spill" and self._spill_to is not None and (self._spill_to / SPILL_NAME).is_dir():
            self.kept.adopt(self._spill_to / SPILL_NAME)
        if recorded is None:
            return
        for name in list(self._start_factors):
            # The first run's adapters started at zero: what they add now was trained before the checkpoint.
            if list(recorded.get(name, ())) == value_sums(self.live.bits(name).cpu()).tolist():
                del self._start_factors[name]
        for name in set(self.live.names) & set(recorded):
            # Trained before the checkpoint, also if it is frozen now.
            if name not in self._changing and self._base_weights not in PROVIDERS and self.counts(name):
                self.kept.capture(name, self.live.shard(name))
            self._changing.add(name)
        asking = set(self.live.changing)
        for name in self._changing - set(recorded):
            if name not in asking:
                # Never trained, and frozen by a callback that came after the weights were first kept.
                self.kept.release(name)
                self._changing.discard(name)
            elif self.counts(name) and name not in self.live.adapted and self._base_weights in PROVIDERS:
                # Frozen until the checkpoint: what it restores is the start value.
                self.kept.capture(name, self.live.shard(name))
        lost = [name for name in self._changing if self.counts(name) and name not in self.live.adapted and not self.kept.has(name)]
        if lost:
            raise LataError(
                f"the start values of {first_three(lost)} cannot be had any more: they are frozen now and were trained before. {_ADVICE}"
            )

    def forget_frozen(self) -> None:
        """On a fresh run: what turned out to be frozen since the weights were first kept needs no start value."""
        for name in self._changing - set(self.live.changing):
            self.kept.release(name)
        self._changing &= set(self.live.changing)

    def verify(self, recorded: Fingerprint | None) -> None:
        """Refuse start weights that are not those a resumed run first started from."""
        if self._base_weights not in PROVIDERS and not self._start_factors:
            return
        if recorded is None:
            raise LataError(
                f"this run resumes from a checkpoint that holds no state of LATACallback, so the weights it first started from are unknown. {_ADVICE}"
            )
        wrong = [name for name in self._changing if name in recorded and list(recorded[name]) != self.fingerprint[name]]
        if wrong:
            raise LataError(
                "the weights this run first started from cannot be had any more: the model was built with other values than at the first start in "
                f"{first_three(wrong)} of {len(self._changing)} tensors. {_ADVICE}"
            )

    def note_frozen(self) -> None:
        """Note the fingerprint of what is frozen, to see later whether it stayed so; not under adapters, whose base may be huge."""
        self._frozen = {} if self.live.adapted else self._sums_of_bits([name for name in self.live.names if name not in self._changing])

    def moved_frozen(self) -> list[str]:
        """Tensors that were changed while they asked for no gradient, as a teacher that follows its student; their start is not known."""
        return sorted(self._moved.union(self._moved_of(name for name in self._frozen if name not in self._changing)))

    def capture_late(self) -> None:
        """Before the first step of a fresh run: take weights that were loaded since as the start, and say so."""
        self.look()
        changed = [name for name in sorted(self._changing) if (self.counts(name) or name in self.live.adapted) and self._differs(name)]
        if changed and self._base_weights not in PROVIDERS:
            raise BaseMismatchError(
                f"the model does not start from {self._base_weights}: it has other values in {first_three(changed)}. Pass the weights it starts from."
            )
        # Each process sees its own part only; one warning, from rank zero, is enough.
        if changed and self.ranks.rank == 0:
            warnings.warn(
                f"weights were loaded after the fit had started ({first_three(changed)}); LATACallback takes those as the start weights",
                stacklevel=2,
            )
        self._capture(changed)

    def note_fingerprint(self, names: Iterable[str] | None = None) -> None:
        """Note the fingerprint of some start values; by default of all."""
        self.fingerprint.update(self._sums_of_bits(self._changing if names is None else names))

    def begin(self) -> None:
        """After the start is certain: note its fingerprint, and spill it if that is wanted."""
        self.note_fingerprint()
        self._spill()

    def capture_unfrozen(self) -> None:
        """Keep tensors that can change from now on; as they could not before, they still have their start values, unless they were set by hand."""
        new = [name for name in self.live.changing if name not in self._changing]
        if new:
            self._moved.update(self._moved_of(name for name in new if name in self._frozen))
            self._capture(new)
            self.note_fingerprint(new)
            self._spill()

    def other_values(self, source: TensorSource) -> list[str]:
        """Tensors of which this process keeps a start value that is not exactly what another source holds.

        Args:
            source: Under the names of the live model; names that it lacks are passed over. It is read once.
        """
        live, wrong = self.live, []
        for name in set(live.names) & set(source.names):
            if (self.kept.sourced(name) and source.dtype(name) == live.dtype(name)) or not self.counts(name):
                continue
            shard = live.shard(name)
            start = self.kept.read(name, shard) if self.kept.has(name) else shard.local
            # Not rounded to the precision of the live tensor: what is written later is added to the values of the source.
            wide = torch.promote_types(start.dtype, source.dtype(name))
            if not same_values(start.to(wide), source.read_slice(name, shard.slices).to(wide)):
                wrong.append(name)
        return wrong

    def look(self) -> LiveModel:
        """The model as it now stands."""
        self._live = look_at(self.root, self._model, self.leave_out)
        return self._live

    def owner(self, name: str) -> int:
        """The process that keeps the start value of a tensor that all processes hold alike."""
        return self.live.index[name] % self.ranks.world

    def counts(self, name: str) -> bool:
        """Whether this process counts its part of a tensor, and keeps the start value of that part."""
        counted = self.live.shard(name).counted
        return self.owner(name) == self.ranks.rank if counted is None else counted

    def _find_head(self) -> None:
        """Leave out a new head, as soon as the model is there."""
        if not self.head.names:
            given = None if self._base_weights in PROVIDERS else self._base_weights
            self.head = new_head(look_at(self.root, self._model, self.leave_out), given)
            self.leave_out = LeaveOut(self.leave_out.patterns, {*self.head.names, *self.head.beside})

    def _capture(self, names: Iterable[str]) -> None:
        for name in list(names):
            self._changing.add(name)
            if name in self.live.adapted:
                self._capture_factors(name)
            elif self.counts(name):
                self.kept.capture(name, self.live.shard(name))

    def _capture_factors(self, name: str) -> None:
        # On every process, as any of them may be asked to export: factors are small.
        added = self.live.added(name)
        self._start_factors.pop(name, None)
        if added.any():
            self._start_factors[name] = added.copy()

    def added(self, name: str) -> LowRank:
        """What adapters have added to a tensor since training started."""
        added, before = self.live.added(name), self._start_factors.get(name)
        if before is None:
            return added
        return LowRank(added.shape, ()) if added.equals(before) else added.since(before)

    @property
    def location(self) -> str | None:
        """Where the start weights lie, as far as that is known; None for adapters that a first round of training left."""
        if self._start_factors and not (isinstance(self.live, LoraModel) and self.live.residual):
            return None
        return self.kept.location or self.live.location

    @property
    def unhashable(self) -> frozenset[str]:
        """Tensors whose start value no single tensor in memory holds: quantised ones, and those whose adapters did not start at zero."""
        return self.live.quantised | frozenset(self._start_factors)

    def _spill(self) -> None:
        if self._base_weights == "spill" and self._spill_to is not None:
            shards = {name: self.live.shard(name) for name in self._changing}
            self.kept.spill(self._spill_to / SPILL_NAME, self.ranks.rank, shards)

    def _moved_of(self, frozen: Iterable[str]) -> list[str]:
        return [name for name, sums in self._sums_of_bits(frozen).items() if sums != self._frozen[name]]

    def _differs(self, name: str) -> bool:
        if name in self.live.adapted:
            before = self._start_factors.get(name)
            added = self.live.added(name)
            return added.any() if before is None else not added.equals(before)
        shard = self.live.shard(name)
        return not same_values(shard.local, self.kept.read(name, shard))

    def _sums_of_bits(self, names: Iterable[str]) -> dict[str, list[int]]:
        """Two sums over the bits of start values (of live ones, where nothing is kept): one reduction, the same result whatever the sharding."""
        listed = sorted(names)
        sums = torch.zeros(len(listed), 2, dtype=torch.int64)
        for index, name in enumerate(listed):
            if self.counts(name):
                is_live = name in self.live.adapted or name not in self._changing
                sums[index] = value_sums(self.live.bits(name).cpu() if is_live else self.kept.read(name, self.live.shard(name)))
                before = self._start_factors.get(name)
                for part in () if before is None else before.parts:
                    sums[index] += value_sums(part.left) + value_sums(part.right)
        return dict(zip(listed, self.ranks.total(sums).tolist(), strict=True))

    def _new_kept(self) -> StartWeights:
        origin, trusted = origin_of(self.live, self._base_weights, self.root, self.leave_out)
        return StartWeights(origin, trusted=trusted)

    def _check_provider(self, live: LiveModel) -> None:
        if self._base_weights == "lora" and not live.adapted:
            raise LataError("base_weights='lora' needs a model wrapped by peft with LoRA; use 'auto'")
        if self._base_weights == "source" and self.kept.copied_bytes:
            raise LataError(
                f"base_weights='source' needs a model whose weights are those of the local directory it was loaded from ({live.location}); use 'auto'"
            )
