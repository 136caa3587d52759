"""The weights of a model in training beside those it started from, on each process of a run."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Set
from pathlib import Path

import torch
from torch import Tensor, nn

from lata_lightning.errors import BaseMismatchError, LataError, first_three
from lata_lightning.layers import STATISTICS, LayerMap, LayerPosition, LayerRule, layer_map
from lata_lightning.live.adapters import LoraModel, look_at
from lata_lightning.live.fingerprints import Fingerprint, Fingerprints
from lata_lightning.live.live_model import LiveModel
from lata_lightning.live.new_heads import NO_HEAD, new_head
from lata_lightning.live.placements.ownership import Ownership
from lata_lightning.live.placements.strategies import strategy_of
from lata_lightning.live.ranks import Ranks
from lata_lightning.live.replicas import check_replicas
from lata_lightning.live.start_factors import StartFactors
from lata_lightning.live.start_weights import PROVIDERS, StartWeights, check_provider, origin_of
from lata_lightning.numerics.low_rank import LowRank
from lata_lightning.numerics.measure import same_values
from lata_lightning.store.hashing import value_sums
from lata_lightning.store.names import NOTHING, LeaveOut
from lata_lightning.store.run_directory import SPILL_NAME

_BUFFER = LayerPosition(None, STATISTICS)
_NO_WEIGHTS = (
    "the model has no weights when the fit starts; build them in __init__, configure_model or setup, and run lazy layers once there"
)
_ADVICE = "Pass base_weights=<directory or checkpoint of the start weights>, or train with base_weights='spill' from the start."


class Tracker:
    """Knows of a module in training which weights it started from, which of its tensors can change, and what this process counts of them.

    Every process of a run has one. Tensors that all processes have alike are shared out among them by name; of sharded tensors each process
    counts its own part.

    Args:
        root: The module that is trained, such as a LightningModule.
        model: Path of the model inside of it; None to look for it.
        base_weights: How the start weights are stored: one of ``PROVIDERS``, or where they lie.
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
        """Head of a classifier that its start does not have; it is left out, too."""
        self._base_weights, self._rule = base_weights, layers
        self.ranks = Ranks()
        self._strategy = strategy_of(root)
        self._live: LiveModel | None = None
        self._ownership: Ownership | None = None
        self._start_weights: StartWeights | None = None
        self._changing: set[str] = set()
        self._start_factors = StartFactors()
        self._fingerprints = Fingerprints(self.ranks, self._local_sums)
        self._spill_to: Path | None = None
        self.begun = False
        """Whether the start is certain."""
        self.positions = LayerMap({}, ())

    @property
    def live(self) -> LiveModel:
        """The model as it was at the last look."""
        if self._live is None:
            raise LataError(_NO_WEIGHTS)
        return self._live

    @property
    def start_weights(self) -> StartWeights:
        """The start weights that this process stores."""
        if self._start_weights is None:
            raise LataError(_NO_WEIGHTS)
        return self._start_weights

    @property
    def changing(self) -> Set[str]:
        """Names of the tensors whose start values are stored, by this process or another; not to be changed."""
        return self._changing

    @property
    def fingerprint(self) -> Fingerprint:
        """Two sums over the bits of every start value, by tensor; empty before the start is certain."""
        return self._fingerprints.start

    def capture_early(self) -> None:
        """Store the weights as they are before a resumed run restores trained ones; nothing if the model has none yet."""
        self._find_head()
        live = self._present()
        if not live.materialized:
            return
        self._live, self._ownership = live, Ownership(live.placements, self.ranks)
        self._start_weights = self._new_start_weights()
        self._capture(live.changing)
        if not live.adapted:
            # What is frozen now may have been trained before the checkpoint that is resumed.
            for name in live.names:
                if name not in self._changing and self.counts(name):
                    self._start_weights.find(name, live.placement(name))

    def settle(self, spill_to: Path | None) -> None:
        """Go through the start weights once more, now that the model has its final precision.

        Args:
            spill_to: Output directory of the run, for spilled start weights.
        """
        self._find_head()
        live, self._spill_to = self.look(), spill_to
        if not live.materialized:
            raise LataError(_NO_WEIGHTS)
        self.leave_out.check_used([*live.names, *live.left_out], "the model in training")
        self._ownership = Ownership(live.placements, self.ranks)
        if self._start_weights is None:
            self._start_weights = self._new_start_weights()
        for name in self._changing:
            self._start_weights.cast(name, live.dtype(name))
            if name in self._start_factors:
                self._start_factors.cast(name, live.added(name).parts[0].left.dtype)
        self._capture(name for name in live.changing if name not in self._changing)
        check_provider(self._base_weights, live, self._start_weights)
        layers = layer_map([name for name in live.names if name not in live.buffers], structure=live.module, rule=self._rule)
        self.positions = LayerMap({name: layers.positions.get(name, _BUFFER) for name in live.names}, layers.blocks)

    def describe(self) -> str:
        """Say how the start weights are stored, for the log."""
        spill_to = self._spill_to / SPILL_NAME if self._base_weights == "spill" and self._spill_to is not None else None
        return self.start_weights.describe(self.live, spill_to)

    def take_up(self, recorded: Fingerprint | None) -> None:
        """On a resumed run, go on with the start of the first run: its spilled start weights take precedence over those captured since.

        Args:
            recorded: The fingerprint in the checkpoint; None if that has none.

        Raises:
            LataError: A start value cannot be had any more.
        """
        if self._base_weights == "spill" and self._spill_to is not None and (self._spill_to / SPILL_NAME).is_dir():
            self.start_weights.adopt(self._spill_to / SPILL_NAME)
        if recorded is not None:
            self._take_up_trained(recorded)
            self._take_up_untrained(recorded)
            self._check_complete()

    def _take_up_trained(self, recorded: Fingerprint) -> None:
        """Capture what the first run trained, also if it is frozen now."""
        for name in self._start_factors.names:
            # The first run's adapters started at zero: what they add now was trained before the checkpoint.
            if list(recorded.get(name, ())) == value_sums(self.live.bits(name).cpu()).tolist():
                self._start_factors.discard(name)
        for name in set(self.live.names) & set(recorded):
            if name not in self._changing and self._base_weights not in PROVIDERS and self.counts(name):
                self.start_weights.capture(name, self.live.placement(name))
            self._changing.add(name)

    def _take_up_untrained(self, recorded: Fingerprint) -> None:
        """Capture or release what the first run did not train."""
        asking = set(self.live.changing)
        for name in self._changing - set(recorded):
            if name not in asking:
                # Never trained, and frozen by a callback that came after the first capture.
                self.start_weights.release(name)
                self._changing.discard(name)
            elif self.counts(name) and name not in self.live.adapted and self._base_weights in PROVIDERS:
                # Frozen until the checkpoint: what it restores is the start value.
                self.start_weights.capture(name, self.live.placement(name))

    def _check_complete(self) -> None:
        copied = [name for name in self._changing if self.counts(name) and name not in self.live.adapted]
        lost = [name for name in copied if not self.start_weights.has(name)]
        if lost:
            raise LataError(
                f"the start values of {first_three(lost)} cannot be had any more: they are frozen now and were trained before. {_ADVICE}"
            )

    def forget_frozen(self) -> None:
        """On a fresh run, release what was frozen since the first capture: it needs no start value."""
        for name in self._changing - set(self.live.changing):
            self.start_weights.release(name)
        self._changing &= set(self.live.changing)

    def verify(self, recorded: Fingerprint | None) -> None:
        """Refuse start weights that are not those a resumed run first started from.

        Raises:
            LataError: They have other values, or the checkpoint does not say which values they had.
        """
        if self._base_weights not in PROVIDERS and not self._start_factors:
            return
        if recorded is None:
            raise LataError(
                f"this run resumes from a checkpoint without state of the callback, so the weights it first started from are unknown. {_ADVICE}"
            )
        wrong = [name for name in self._changing if name in recorded and list(recorded[name]) != self.fingerprint[name]]
        if wrong:
            raise LataError(
                "the weights this run first started from cannot be had any more: the model was built with other values than at the first start in "
                f"{first_three(wrong)} of {len(self._changing)} tensors. {_ADVICE}"
            )

    def capture_late(self) -> None:
        """Before the first step of a fresh run, take weights that were loaded since as the start, and say so.

        Raises:
            BaseMismatchError: The start weights are given, and the model has others.
        """
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

    def note_fingerprint(self) -> None:
        """Note the fingerprint of all start values."""
        self._fingerprints.note_start(self._changing)

    def begin(self) -> None:
        """Note fingerprints now that the start is certain, and spill the start weights if that is wanted.

        Frozen weights are noted, too, to see later whether they stayed as they are; not under adapters, whose base may be huge.

        Raises:
            LataError: Processes have other values of a parameter that they should have copies of.
        """
        check_replicas(self.live, self.ranks)
        self.note_fingerprint()
        self._spill()
        self._fingerprints.note_frozen(() if self.live.adapted else [name for name in self.live.names if name not in self._changing])
        self.begun = True

    def capture_unfrozen(self) -> None:
        """Capture tensors that can change from now on: as they could not before, they have their start values, unless they were set by hand."""
        new = [name for name in self.live.changing if name not in self._changing]
        if new:
            self.look()
            self._fingerprints.note_unfrozen(new)
            self._capture(new)
            self._fingerprints.note_start(new)
            self._spill()

    def unfrozen_unseen(self) -> list[str]:
        """Return the tensors that can change by now, were never captured, and are not certain to have their start values still."""
        return self._fingerprints.uncertain(name for name in self.live.changing if name not in self._changing)

    def moved_frozen(self) -> list[str]:
        """Return the tensors that were changed while they asked for no gradient, as a teacher that follows its student; their start is not known."""
        return self._fingerprints.moved_frozen(self._changing)

    def wrapped_in(self, trained: nn.Module | None) -> None:
        """Find out how the parameters are spread over the processes, from what the strategy has wrapped around the root; None if nothing."""
        self._strategy = strategy_of(trained or self.root)

    def look(self) -> LiveModel:
        """Return the model as it is now. Every process has to call this."""
        self._live = self._present()
        return self._live

    @property
    def ownership(self) -> Ownership:
        """Which process owns which part of each tensor."""
        if self._ownership is None:
            raise LataError(_NO_WEIGHTS)
        return self._ownership

    def counts(self, name: str) -> bool:
        """Whether this process counts its part of a tensor, and stores the start value of that part."""
        return self.ownership.counts(name)

    def added(self, name: str) -> LowRank:
        """Return what adapters have added to a tensor since training started."""
        return self._start_factors.since(name, self.live.added(name))

    @property
    def location(self) -> str | None:
        """Where the start weights lie, as far as that is known; None for adapters that a first round of training left."""
        if self._start_factors and not (isinstance(self.live, LoraModel) and self.live.residual):
            return None
        return self.start_weights.location or self.live.location

    @property
    def unhashable(self) -> frozenset[str]:
        """Tensors whose start value no single tensor in memory has: quantised ones, and those whose adapters did not start at zero."""
        return self.live.quantised | self._start_factors.names

    def _present(self) -> LiveModel:
        return look_at(self.root, self._model, self.leave_out, self._strategy)

    def _find_head(self) -> None:
        """Leave out a new head, as soon as the model is there."""
        if not self.head.names:
            given = None if self._base_weights in PROVIDERS else self._base_weights
            self.head = new_head(self._present(), given)
            self.leave_out = LeaveOut(self.leave_out.patterns, {*self.head.names, *self.head.beside})

    def _capture(self, names: Iterable[str]) -> None:
        for name in list(names):
            self._changing.add(name)
            if name in self.live.adapted:
                self._start_factors.capture(name, self.live.added(name))
            elif self.counts(name):
                self.start_weights.capture(name, self.live.placement(name))

    def _spill(self) -> None:
        if self._base_weights == "spill" and self._spill_to is not None:
            regions = {name: self.live.placement(name).region for name in self._changing}
            self.start_weights.spill(self._spill_to / SPILL_NAME, self.ranks.rank, regions)

    def _differs(self, name: str) -> bool:
        if name in self.live.adapted:
            return self._start_factors.differ(name, self.live.added(name))
        part = self.live.placement(name)
        return not same_values(part.values(), self.start_weights.read(name, part))

    def _local_sums(self, name: str) -> Tensor:
        """Sums over the bits of the part of a tensor that this process counts: of its start value, or of the live one where nothing is stored."""
        sums = torch.zeros(2, dtype=torch.int64)
        if self.counts(name):
            is_live = name in self.live.adapted or name not in self._changing
            values = self.live.bits(name) if is_live else self.start_weights.read(name, self.live.placement(name))
            sums += value_sums(values.cpu())
        return sums + self._start_factors.value_sums(name) if self.ownership.leads(name) else sums

    def _new_start_weights(self) -> StartWeights:
        origin, trusted = origin_of(self.live, self._base_weights, self.root, self.leave_out)
        return StartWeights(origin, trusted=trusted)
