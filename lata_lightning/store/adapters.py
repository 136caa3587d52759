"""Peft adapter directories: LoRA as a difference in factors, and as the whole weights that base and adapter make."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lata_lightning.combining import combine
from lata_lightning.errors import BaseMismatchError, CorruptFileError, LataError, LayoutMismatchError, SourceError, first_three
from lata_lightning.layers import skeleton
from lata_lightning.low_rank import LowRank
from lata_lightning.store.checkpoint_names import under_checkpoint_names
from lata_lightning.store.directories import ADAPTER_CONFIG, read_object
from lata_lightning.store.hashing import content_hash, hash_values
from lata_lightning.store.lora import RESIDUAL, AdaptedModel
from lata_lightning.store.sources import Source
from lata_lightning.sums import difference

_WEIGHTS_NAME = "adapter_model.safetensors"


def named_base(directory: Path) -> str | None:
    """Where, by its config, the weights lie that an adapter was trained on; None if it does not say."""
    return read_object(directory / ADAPTER_CONFIG).get("base_model_name_or_path") or None


class AdapterDifference(Source):
    """What a LoRA adapter adds to the weights it was trained on, tensor by tensor.

    Tensors under LoRA layers are held as factors; trained copies (``modules_to_save``) and biases as differences to the start.

    Args:
        start: The weights the adapter was trained on.
        adapted: The model with the adapter on it; its base weights may be empty (meta tensors).
        location: Where the adapter lies, for messages and provenance; None for a model in memory.

    Attributes:
        unchanged: Names of the tensors that the adapter leaves as they are.

    Raises:
        LayoutMismatchError: It belongs to a model of another layout.
        BaseMismatchError: It was trained on other weights, as far as they are known.
    """

    def __init__(self, start: Source, adapted: AdaptedModel, location: str | None) -> None:
        self._start, self._adapted, self.location = start, adapted, location
        own = {name: tensor for name, tensor in self._adapted.plain.items() if not tensor.is_meta}
        self._whole = {name: tensor.detach() for name, tensor in under_checkpoint_names(self._adapted.module, own).items()}
        self._names = tuple(name for name in start.names if start.dtype(name).is_floating_point)
        foreign = (set(self._whole) | self._adapted.adapted) - set(self._names)
        if foreign:
            raise LayoutMismatchError(
                f"{self.label} adapts tensors that {start.label} does not hold, {first_three(foreign)}. Was it trained on a model of this architecture?"
            )
        odd = [name for name in self._adapted.adapted if self._adapted.added(name).shape != start.shape(name)]
        odd += [name for name, tensor in self._whole.items() if tuple(tensor.shape) != start.shape(name)]
        if odd:
            raise LayoutMismatchError(f"{self.label} and {start.label} must have the same shapes; different are {first_three(odd)}")
        # A model in memory holds the weights under its adapters, and peft saves the embeddings it adapts: they are the start's, or the start is wrong.
        copied = self._adapted.adapted & set(self._whole)
        other = [name for name in copied if not torch.equal(self._whole.pop(name).cpu().float(), start.read(name).float())]
        if other:
            raise BaseMismatchError(
                f"{self.label} was trained on other weights than {start.label}: it carries other values of {first_three(other)}. Give those as START."
            )
        self.unchanged = frozenset(self._names) - self._adapted.adapted - frozenset(self._whole)

    @property
    def names(self) -> tuple[str, ...]:  # noqa: D102
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:  # noqa: D102
        return self._start.shape(name)

    def dtype(self, name: str) -> torch.dtype:  # noqa: D102
        return torch.promote_types(self._start.dtype(name), torch.float32)

    def read(self, name: str) -> Tensor:  # noqa: D102
        factors = self.low_rank(name)
        if factors is not None:
            return factors.dense(self.dtype(name))
        if name in self._whole:
            return difference(self._whole[name].cpu(), self._start.read(name))
        return torch.zeros(self.shape(name), dtype=self.dtype(name))

    def low_rank(self, name: str) -> LowRank | None:  # noqa: D102
        return self._adapted.added(name).copy() if name in self._adapted.adapted else None

    def content_hashes(self) -> tuple[str | None, str | None]:
        """Content hash of the start, which is read for it, and None: the sums of weights and what is added to them are never formed."""
        return content_hash({name: hash_values(self._start.read(name)) for name in self._names}), None


class AdaptedWeights(Source):
    """The whole weights that a start and an adapter make: each sum formed in float64 and rounded once to the start's dtype."""

    def __init__(self, start: Source, added: AdapterDifference) -> None:
        self._start, self._added = start, added
        self.location, self.directory, self.config = added.location, start.directory, start.config

    @property
    def names(self) -> tuple[str, ...]:  # noqa: D102
        return self._start.names

    def shape(self, name: str) -> tuple[int, ...]:  # noqa: D102
        return self._start.shape(name)

    def dtype(self, name: str) -> torch.dtype:  # noqa: D102
        return self._start.dtype(name)

    def read(self, name: str) -> Tensor:  # noqa: D102
        weight = self._start.read(name)
        if name in self._added.unchanged or not weight.is_floating_point():
            return weight
        return combine(weight, [(self._added.low_rank(name) or self._added.read(name), 1.0)], weight.dtype)


def check_same_base(start: Source, base: Source, adapter: str) -> None:
    """Refuse a start that is known to differ from the weights an adapter was trained on.

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


def adapted_model(start: Source, directory: Path) -> AdaptedModel:
    """The empty model that a start's config describes, with an adapter directory's own tensors in place.

    Raises:
        SourceError: The adapter is no plain LoRA, what its factors started with is not known, or the start is of no architecture that
            transformers knows.
        LayoutMismatchError: It belongs to a model of another layout.
        CorruptFileError: Its files cannot be read, or lack tensors.
    """
    config = read_object(directory / ADAPTER_CONFIG)
    if config.get("peft_type") != "LORA":
        raise SourceError(
            f"{directory} is a peft adapter of the type {config.get('peft_type')}, and LoRA is what can be read as factors. Where peft can merge it, save "
            "what merge_and_unload() gives and extract from that."
        )
    if str(config.get("init_lora_weights")).startswith(RESIDUAL):
        raise SourceError(
            f"{directory} was initialised by {config['init_lora_weights']}, which changes the base weights, and does not hold what its factors started "
            "with. Save it with save_pretrained(…, path_initial_model_for_weight_conversion=…), or merge_and_unload() it and extract from that."
        )
    module = None if start.config is None else skeleton(start.config)
    if module is None:
        raise SourceError(
            f"{start.label} must be a Hugging Face directory of an architecture that transformers knows, to find the layers that {directory} adapts"
        )
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    held = _read_weights(directory)
    with warnings.catch_warnings():
        # What peft remarks on when it wraps an empty model concerns training it.
        warnings.simplefilter("ignore")
        try:
            model = PeftModel(module, PeftConfig.from_pretrained(directory), low_cpu_mem_usage=True)
        except (ValueError, TypeError, RuntimeError, KeyError) as error:
            raise LayoutMismatchError(f"{directory} cannot be put onto the model of {start.label}: {error}") from error
        parameters = dict(model.named_parameters(remove_duplicate=False))
        stored = get_peft_model_state_dict(model, state_dict=dict(parameters))
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    places = {key: name_of[id(parameter)] for key, parameter in stored.items()}
    _check_keys(held, places, directory)
    try:
        model.load_state_dict({places[key]: tensor for key, tensor in held.items()}, strict=False, assign=True)
    except RuntimeError as error:
        raise LayoutMismatchError(f"{directory} has tensors of other shapes than its config and {start.label} say: {error}") from error
    try:
        return AdaptedModel(model)
    except LataError as error:
        raise SourceError(f"{directory}: {error}") from error


def _read_weights(directory: Path) -> dict[str, Tensor]:
    path = directory / _WEIGHTS_NAME
    if not path.is_file():
        raise SourceError(
            f"{directory} holds no {_WEIGHTS_NAME}; pickled adapters can run code when they are loaded: convert it to safetensors first"
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CorruptFileError(f"{path} is no readable safetensors file ({error}). Is it complete? Copy or download it again.") from error


def _check_keys(held: Mapping[str, Tensor], places: Mapping[str, str], directory: Path) -> None:
    # Embeddings are saved along by choice of whoever saved them.
    missing = [key for key in set(places) - set(held) if ".base_layer." not in key and "lora_" in key]
    if missing:
        raise CorruptFileError(
            f"{directory / _WEIGHTS_NAME} lacks tensors that its config asks for, {first_three(missing)}. Copy it again."
        )
    foreign = set(held) - set(places)
    if foreign:
        raise LayoutMismatchError(f"{directory / _WEIGHTS_NAME} holds tensors that have no place in the model, {first_three(foreign)}")
