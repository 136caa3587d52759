"""What a peft adapter changes: as a difference to its start, and as the whole weights of start plus adapter."""

from __future__ import annotations

from dataclasses import replace
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from lata_lightning.errors import BaseMismatchError, LataError, LayoutMismatchError, SourceError, differing, first_three
from lata_lightning.numerics.chunks import ChunkReader, zeros
from lata_lightning.numerics.combine import combine
from lata_lightning.numerics.low_rank import LowRank
from lata_lightning.numerics.measure import difference
from lata_lightning.store.checkpoint_names import under_checkpoint_names
from lata_lightning.store.hashing import content_hash, hash_values
from lata_lightning.store.lora import AdaptedModel
from lata_lightning.store.names import leave_out_pattern
from lata_lightning.store.sources import IN_MEMORY, Origin, TensorSource
from lata_lightning.store.views import Computed


@final
class AdapterDifference(TensorSource):
    """What a LoRA adapter adds to the weights it was trained on, tensor by tensor.

    Tensors under LoRA layers stay factors. Trained copies (``modules_to_save``), biases, and weights that another kind of adapter changes are dense
    differences to the start, each computed when it is read.

    Args:
        start: The weights the adapter was trained on; with ``before``, those weights plus the other adapter.
        adapted: The model with the adapter on it; its base weights may be meta tensors.
        origin: Where the adapter comes from.
        before: What another adapter adds to the same weights. Then this is the difference of the two adapters.

    Attributes:
        start: The weights that the adapter, or both adapters, add to.
        unchanged: Names of the tensors that the adapter leaves as they are.
        left_out: Names of the tensors of a head that the adapted model has and the start lacks.

    Raises:
        LayoutMismatchError: It belongs to a model with other layers.
        BaseMismatchError: It is known to have been trained on other weights.
        SourceError: Peft cannot merge a layer of it.
    """

    def __init__(
        self, start: TensorSource, adapted: AdaptedModel, origin: Origin = IN_MEMORY, before: AdapterDifference | None = None
    ) -> None:
        super().__init__(origin)
        self._hashed, self._before = start, before
        self._adapted = adapted
        self.left_out: tuple[str, ...] = ()
        self.start: TensorSource = start if before is None else before.start
        start = self.start
        own = {name: tensor for name, tensor in self._adapted.plain.items() if not tensor.is_meta}
        self._whole = {name: tensor.detach() for name, tensor in under_checkpoint_names(self._adapted.module, own).items()}
        self._names = tuple(name for name in start.names if start.dtype(name).is_floating_point)
        changed = self._by_layer
        foreign = (set(self._whole) | changed) - set(self._names)
        if foreign and not foreign & changed and leave_out_pattern(foreign, self._names) is not None:
            # A head that was added to the start: no vector over the start can have it.
            self.left_out = tuple(sorted(foreign))
            self._whole = {name: tensor for name, tensor in self._whole.items() if name not in foreign}
        elif foreign:
            raise LayoutMismatchError(
                f"{self.label} adapts tensors that {start.label} does not hold, {first_three(foreign)}. Was it trained on a model of this architecture?"
            )
        odd = [name for name in self._adapted.adapted if self._adapted.added(name).shape != start.shape(name)]
        odd += [name for name, tensor in self._whole.items() if tuple(tensor.shape) != start.shape(name)]
        if odd:
            raise LayoutMismatchError(
                f"{self.label} and {start.label} must have the same shapes; {differing(odd, len(self._adapted.adapted) + len(self._whole))}"
            )
        # A model in memory has the weights under its adapters, and peft saves the embeddings it adapts: both must equal those of the start.
        copied = changed & set(self._whole)
        equal = {name for name in self._whole if self._is_start(name)}
        other = copied - equal
        if other and adapted.residual:
            raise BaseMismatchError(
                f"{self.label} was initialised in a way that changes the base weights, and the first values of its factors are lost. Train it "
                "under LATACallback, or save it with path_initial_model_for_weight_conversion=… and give that directory."
            )
        if other:
            raise BaseMismatchError(
                f"{self.label} was trained on other weights than {start.label}: it carries other values of {first_three(other)}. Give those as START."
            )
        # A model in memory also has everything that was frozen.
        self._whole = {name: tensor for name, tensor in self._whole.items() if name not in equal}
        self.unchanged = frozenset(self._names) - changed - frozenset(self._whole)
        if before is not None:
            self.unchanged &= before.unchanged
        try:
            adapted.check_merged(start.read)
        except LataError as error:
            raise SourceError(f"{self.label}: {error}") from error

    def _is_start(self, name: str) -> bool:
        """Return whether a whole tensor equals that of the start, rounded to the precision in which it was loaded."""
        own = self._whole[name].cpu()
        return torch.equal(own, self.start.read(name).to(own.dtype))

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return self._names

    @override
    def shape(self, name: str) -> tuple[int, ...]:
        return self.start.shape(name)

    @override
    def dtype(self, name: str) -> torch.dtype:
        return torch.promote_types(self.start.dtype(name), torch.float32)

    @override
    def read(self, name: str) -> Tensor:
        if name in self.unchanged:
            return torch.zeros(self.shape(name), dtype=self.dtype(name))
        factors, before = self.low_rank(name), self._before
        if factors is not None:
            return factors.dense(self.dtype(name))
        if before is None:
            return difference(self.whole(name), self.start.read(name)).to(self.dtype(name))
        if name in self._by_layer or name in before._by_layer:
            return (self._dense(name) - before._dense(name)).to(self.dtype(name))
        return difference(self.whole(name), before.whole(name)).to(self.dtype(name))

    @override
    def chunks(self, name: str) -> ChunkReader:
        return zeros(self.dtype(name)) if name in self.unchanged else super().chunks(name)

    @override
    def low_rank(self, name: str) -> LowRank | None:
        if self._before is None:
            return self._factors(name)
        now, before, nothing = self._factors(name), self._before._factors(name), LowRank(self.shape(name), ())
        if (now is None and before is None) or name in self._whole or name in self._before._whole:
            return None
        now, before = now or nothing, before or nothing
        return nothing if now.equals(before) else now.since(before)

    def whole(self, name: str) -> Tensor:
        """Return the values of a tensor to which no factors are added, in float64 if an adapter computes them from those of the start."""
        if name in self._whole:
            return self._whole[name].cpu()
        return self._adapted.values(name, self.start.read) if name in self._adapted.merged else self.start.read(name)

    @property
    def _by_layer(self) -> frozenset[str]:
        """Tensors that a layer of the adapter changes."""
        return self._adapted.adapted | self._adapted.merged

    def _dense(self, name: str) -> Tensor:
        """Return what is added to a tensor, in float64."""
        factors = self._factors(name)
        if factors is not None:
            return factors.dense(torch.float64)
        return difference(self.whole(name), self.start.read(name)).double()

    def _factors(self, name: str) -> LowRank | None:
        return self._adapted.added(name).copy() if name in self._adapted.adapted else None

    @override
    def content_hashes(self) -> tuple[str | None, str | None]:
        # The start is read for its hash. The sums of weights and what is added to them are never formed, so they have none.
        return content_hash({name: hash_values(self._hashed.read(name)) for name in self._names}), None


@final
class AdaptedWeights(Computed):
    """The weights of a model with its adapter merged into them.

    A tensor with an adapter is start + difference, summed in float64 and rounded once to the dtype of the start. A tensor that was trained as a copy
    (``modules_to_save``) is that copy, in the dtype of the start. Each is computed when it is read.

    Args:
        start: The weights the adapter was trained on.
        added: The difference that the adapter makes to them.

    Attributes:
        start: The weights without the adapter.
        added: The difference that the adapter makes.
    """

    def __init__(self, start: TensorSource, added: AdapterDifference) -> None:
        super().__init__(start, replace(added.origin, directory=start.directory, config=start.config))
        self.start, self.added = start, added

    @override
    def read(self, name: str) -> Tensor:
        factors = self.added.low_rank(name)
        if factors is None:
            values = self.added.whole(name)
            return values if values.dtype == self.dtype(name) else combine(values, [], self.dtype(name))
        return combine(self.start.read(name), [(factors, 1.0)], self.dtype(name))


def adapter_in(weights: TensorSource) -> AdapterDifference | None:
    """Return what an adapter adds in weights that a start and an adapter make; None for any other weights."""
    return weights.added if isinstance(weights, AdaptedWeights) else None


def check_same_base(start: TensorSource, base: TensorSource, adapter: str) -> None:
    """Refuse a start whose weights differ from those an adapter was trained on.

    Raises:
        BaseMismatchError: A tensor has other values.
    """
    shared = [name for name in start.names if name in set(base.names)]
    other = next(
        (name for name in shared if start.shape(name) != base.shape(name) or not torch.equal(start.read(name), base.read(name))), None
    )
    if other is not None:
        raise BaseMismatchError(
            f"{adapter} was trained on {base.label}, and {start.label} holds other weights (first in {other!r}), so tuned − start is not what the adapter "
            f"adds. Give {base.label} as START."
        )
