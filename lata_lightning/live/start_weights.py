"""The weights a fine-tune starts from: re-read, copied or spilled, whatever costs least and is certain."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lata_lightning.errors import CorruptFileError, LataError
from lata_lightning.live.live_model import LiveModel
from lata_lightning.live.matching import matched_to
from lata_lightning.live.placements.placement import Placement
from lata_lightning.live.placements.region import Region
from lata_lightning.numerics.measure import same_values
from lata_lightning.store.names import LeaveOut
from lata_lightning.store.opening import open_source
from lata_lightning.store.sources import TensorSource

PROVIDERS = ("auto", "lora", "source", "spill", "memory")


class StartWeights:
    """Start values of the tensors that training can change, of the parts this process owns.

    Of a tensor under an adapter, and of a frozen one, the live tensor is the start value, and nothing is kept. Others are read again from
    ``origin`` if they are equal to what lies there, copied to CPU memory otherwise, and moved on to files by ``spill``.

    Args:
        origin: Weights on disk, under the names of the live model; None if there are none.
        trusted: Whether ``origin`` is known to hold the start values, even where the live ones differ by now.
    """

    def __init__(self, origin: TensorSource | None = None, *, trusted: bool = False) -> None:
        self._origin, self._trusted = origin, trusted
        self._available = frozenset(() if origin is None else origin.names)
        self._stamps = _stamps(origin)
        self._copies: dict[str, Tensor] = {}
        self._sourced: set[str] = set()
        self._spill: Spill | None = None

    @property
    def location(self) -> str | None:
        """Where start values are read again from; None if nowhere."""
        return self._origin.location if self._origin is not None and self._sourced else None

    @property
    def copied_bytes(self) -> int:
        """Bytes of memory that the copies take."""
        return sum(copy.nbytes for copy in self._copies.values())

    def describe(self, live: LiveModel, spill_to: Path | None = None) -> str:
        """What is kept where, for the log.

        Args:
            live: The model in training.
            spill_to: Where the copies go before the first step; None if they stay in memory.
        """
        parts = []
        if live.adapted:
            parts.append(f"{len(live.adapted)} tensors under adapters need no copy")
        if self._sourced and self._origin is not None:
            parts.append(f"{len(self._sourced)} tensors are read again from {self._origin.location}, at 0 bytes per parameter")
        if self._spill is not None:
            parts.append(f"{len(self._spill)} tensors lie in {self._spill.directory}, at 0 bytes of memory per parameter")
        if self._copies and spill_to is not None:
            parts.append(
                f"{len(self._copies)} tensors are written to {spill_to}: {self.copied_bytes / 2**20:,.1f} MiB of disk, none of memory"
            )
        elif self._copies:
            each = self.copied_bytes / sum(copy.numel() for copy in self._copies.values())
            parts.append(
                f"{len(self._copies)} tensors are copied to memory: {self.copied_bytes / 2**20:,.1f} MiB, {each:.0f} bytes per parameter"
            )
        return "; ".join(parts) or "no tensor can change"

    def has(self, name: str) -> bool:
        """Whether the start value of a tensor is kept."""
        return name in self._copies or name in self._sourced or (self._spill is not None and name in self._spill)

    def sourced(self, name: str) -> bool:
        """Whether the start value of a tensor is read again from the origin, where it was equal to the live one."""
        return name in self._sourced

    def find(self, name: str, part: Placement) -> bool:
        """Whether the present value of a tensor lies in the origin, so that it costs nothing to keep."""
        if name in self._available and (self._trusted or same_values(self._from_origin(name, part), part.values())):
            self._sourced.add(name)
            return True
        return False

    def capture(self, name: str, part: Placement) -> None:
        """Keep the present value of a tensor, in place of what was kept of it before."""
        self.release(name)
        if self.find(name, part):
            return
        values = part.values()
        copy = values.to("cpu", copy=True)
        # From pinned memory a GPU fetches without stopping for it.
        self._copies[name] = copy.pin_memory() if values.is_cuda else copy

    def release(self, name: str) -> None:
        """Keep a tensor no longer."""
        self._copies.pop(name, None)
        self._sourced.discard(name)

    def cast(self, name: str, dtype: torch.dtype) -> None:
        """Round a copy to the precision in which the trainer now holds the tensor."""
        if name in self._copies:
            self._copies[name] = self._copies[name].to(dtype)

    def read(self, name: str, part: Placement) -> Tensor:
        """Return the start values of the part of a tensor that lies on this process, at the precision of the live one; on the CPU.

        Raises:
            LataError: It is not kept, or the files it was to be read from have changed.
        """
        if name in self._copies:
            return self._copies[name]
        if name in self._sourced:
            return self._from_origin(name, part)
        if self._spill is not None and name in self._spill:
            return self._spill.read(name, part)
        raise LataError(f"the start value of {name} was not kept")

    def spill(self, directory: Path, rank: int, regions: Mapping[str, Region]) -> None:
        """Move the copies to files of this process."""
        if self._spill is None:
            self._spill = Spill(directory)
        if self._copies:
            self._spill.write(rank, self._copies, regions)
            self._copies = {}

    def adopt(self, directory: Path) -> None:
        """Read start values from the files an interrupted run has left; they stand before anything captured since."""
        self._spill = Spill(directory)
        for name in self._spill.names:
            self.release(name)

    def check_origin(self) -> None:
        """Refuse to go on if the files to read from were changed since the fit started."""
        if self._sourced and self._stamps != _stamps(self._origin):
            raise LataError(
                f"the start weights in {self._origin.location if self._origin else ''} were changed while training ran, so the task vector cannot be "
                "measured any more. Keep them as they are, or train with base_weights='memory'."
            )

    def close(self) -> None:
        """Remove the spilled files: nothing needs them any more."""
        if self._spill is not None:
            shutil.rmtree(self._spill.directory, ignore_errors=True)

    def _from_origin(self, name: str, part: Placement) -> Tensor:
        if self._origin is None:
            raise LataError(f"there are no files to read the start value of {name} from")
        # At the precision the trainer keeps: a finer start would show as a difference that training never made.
        return part.rounded(part.region.read(self._origin, name))


class Spill:
    """Files of start values, one or more per process, each with the regions of its parts.

    A run that is resumed with another number of processes puts the parts together anew.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._parts: dict[str, list[tuple[Path, Region]]] = {}
        for file in sorted(directory.glob("*.safetensors")) if directory.is_dir() else []:
            self._index(file)

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def __len__(self) -> int:
        return len(self._parts)

    @property
    def names(self) -> Iterable[str]:
        """Names of the tensors that lie here."""
        return self._parts.keys()

    def write(self, rank: int, tensors: Mapping[str, Tensor], regions: Mapping[str, Region]) -> None:
        """Add a file with parts of tensors; it appears whole or not at all."""
        self.directory.mkdir(parents=True, exist_ok=True)
        number = len(list(self.directory.glob(f"rank-{rank:05d}-*.safetensors")))
        file = self.directory / f"rank-{rank:05d}-{number:03d}.safetensors"
        places = {name: [regions[name].shape, regions[name].bounds] for name in tensors}
        partial = file.with_suffix(".partial")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata={"regions": json.dumps(places)})
        partial.replace(file)
        self._index(file)

    def read(self, name: str, part: Placement) -> Tensor:
        """Return the values in the region of a placement, put together from all files that hold some of them.

        Raises:
            CorruptFileError: The files do not hold all of them.
        """
        wanted = part.region
        if any(region.shape != wanted.shape for _, region in self._parts[name]):
            # Written under a strategy that cuts tensors in another way.
            return wanted.of(self._assembled(name, Region.whole(self._parts[name][0][1].shape), part.dtype))
        return self._assembled(name, wanted, part.dtype)

    def _assembled(self, name: str, wanted: Region, dtype: torch.dtype) -> Tensor:
        found = torch.empty(wanted.size, dtype=dtype)
        filled = 0
        for file, stored in self._parts[name]:
            common = stored.overlap(wanted)
            if common is None:
                continue
            with safe_open(file, framework="pt") as handle:
                piece = handle.get_tensor(name)[common.inside(stored)]
            found[common.inside(wanted)] = piece.to(dtype)
            filled += piece.numel()
        if filled != found.numel():
            raise CorruptFileError(f"the spilled start weights in {self.directory} hold {filled} of {found.numel()} entries of {name}")
        return found

    def _index(self, file: Path) -> None:
        with safe_open(file, framework="pt") as handle:
            places = json.loads((handle.metadata() or {}).get("regions", "{}"))
        for name, (shape, bounds) in places.items():
            self._parts.setdefault(name, []).append((file, Region(tuple(shape), tuple((begin, end) for begin, end in bounds))))


def origin_of(live: LiveModel, base_weights: str, root: nn.Module, leave_out: LeaveOut) -> tuple[TensorSource | None, bool]:
    """Where start weights may be read again from.

    Args:
        live: The model in training.
        base_weights: One of ``PROVIDERS``, or where the start weights lie.
        root: The LightningModule, in which an error may name the model that is meant.
        leave_out: What the start weights need not hold.

    Returns:
        The start weights under the names of the live model, None where there are none on disk; and whether they are known to be the start values.

    Raises:
        LayoutMismatchError: ``base_weights`` does not fit the model.
    """
    if base_weights not in PROVIDERS:
        return matched_to(live, open_source(base_weights), f"the start weights {base_weights}", root, leave_out), True
    if base_weights not in ("auto", "source") or live.location is None or not Path(live.location).is_dir():
        return None, False
    try:
        return matched_to(live, open_source(live.location), live.location, root, leave_out), False
    except LataError:
        # What the model says it was loaded from need not be weights of its own shape; then they are copied.
        return None, False


def check_provider(base_weights: str, live: LiveModel, start_weights: StartWeights) -> None:
    """Refuse a way of storing start weights that this model does not allow.

    Raises:
        LataError: ``"lora"`` without adapters, or ``"source"`` where the model has other values than the files it was loaded from.
    """
    if base_weights == "lora" and not live.adapted:
        raise LataError("base_weights='lora' needs a model wrapped by peft with LoRA; use 'auto'")
    if base_weights == "source" and start_weights.copied_bytes:
        raise LataError(
            f"base_weights='source' needs a model whose weights are those of the local directory it was loaded from ({live.location}); use 'auto'"
        )


def _stamps(origin: TensorSource | None) -> list[tuple[str, int, int]]:
    """Size and time of the files of a directory, by which a change is noticed."""
    if origin is None or origin.directory is None:
        return []
    files = sorted(origin.directory.glob("*.safetensors"))
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
