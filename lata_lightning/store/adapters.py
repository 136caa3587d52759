"""Peft adapter directories: LoRA as a difference in factors, and as the whole weights that base and adapter make."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lata_lightning.errors import BaseMismatchError, CorruptFileError, LataError, LayoutMismatchError, SourceError, first_three
from lata_lightning.layers import skeleton
from lata_lightning.numerics.combine import combine
from lata_lightning.numerics.low_rank import LowRank
from lata_lightning.numerics.measure import difference
from lata_lightning.store.checkpoint_names import under_checkpoint_names
from lata_lightning.store.directories import ADAPTER_CONFIG, read_object
from lata_lightning.store.hashing import content_hash, hash_values
from lata_lightning.store.lora import RESIDUAL, AdaptedModel
from lata_lightning.store.sources import Source

_WEIGHTS_NAME = "adapter_model.safetensors"


def named_base(directory: Path) -> str | None:
    """Where, by its config, the weights lie that an adapter was trained on; None if it does not say.

    Raises:
        CorruptFileError: The config cannot be read, or does not hold a text there.
    """
    named = read_object(directory / ADAPTER_CONFIG).get("base_model_name_or_path") or None
    if named is not None and not isinstance(named, str):
        raise CorruptFileError(f"{directory / ADAPTER_CONFIG} must name its base model by a text, it holds {named!r}")
    return named


class AdapterDifference(Source):
    """What a LoRA adapter adds to the weights it was trained on, tensor by tensor.

    Tensors under LoRA layers are held as factors; trained copies (``modules_to_save``) and biases as differences to the start.

    Args:
        start: The weights the adapter was trained on; with ``before``, the weights that those and the other adapter make.
        adapted: The model with the adapter on it; its base weights may be empty (meta tensors).
        location: Where the adapter lies, for messages and provenance; None for a model in memory.
        before: What another adapter adds to the weights this one was trained on. Then this is what the one adds more than the other.

    Attributes:
        unchanged: Names of the tensors that the adapter leaves as they are.

    Raises:
        LayoutMismatchError: It belongs to a model of another layout.
        BaseMismatchError: It was trained on other weights, as far as they are known.
    """

    def __init__(self, start: Source, adapted: AdaptedModel, location: str | None, before: AdapterDifference | None = None) -> None:
        self._hashed, self._before = start, before
        self._adapted, self.location = adapted, location
        self._start: Source = start if before is None else before._start
        start = self._start
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
        equal = {name for name in self._whole if self._is_start(name)}
        other = copied - equal
        if other and adapted.residual:
            raise BaseMismatchError(
                f"{self.label} was initialised in a way that changes the base weights, and what its factors started with is not known any more. Train it "
                "under LATACallback, or save it with path_initial_model_for_weight_conversion=… and give that directory."
            )
        if other:
            raise BaseMismatchError(
                f"{self.label} was trained on other weights than {start.label}: it carries other values of {first_three(other)}. Give those as START."
            )
        # A model in memory also holds everything that was frozen.
        self._whole = {name: tensor for name, tensor in self._whole.items() if name not in equal}
        self.unchanged = frozenset(self._names) - self._adapted.adapted - frozenset(self._whole)
        if before is not None:
            self.unchanged &= before.unchanged

    def _is_start(self, name: str) -> bool:
        """Whether a tensor held whole is that of the start, as rounded to the precision it was loaded in."""
        held = self._whole[name].cpu()
        return torch.equal(held, self._start.read(name).to(held.dtype))

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
        before = self._before
        if before is not None and (self._factors(name) is not None or before._factors(name) is not None):
            return self._dense(name) - before._dense(name)
        return difference(self.whole(name), self._start.read(name) if before is None else before.whole(name)).to(self.dtype(name))

    def low_rank(self, name: str) -> LowRank | None:  # noqa: D102
        if self._before is None:
            return self._factors(name)
        now, before, nothing = self._factors(name), self._before._factors(name), LowRank(self.shape(name), ())
        if (now is None and before is None) or name in self._whole or name in self._before._whole:
            return None
        now, before = now or nothing, before or nothing
        return nothing if now.equals(before) else now.since(before)

    def whole(self, name: str) -> Tensor:
        """The values of a tensor that no factors are added to: the trained copy, or those of the weights under the adapter."""
        return self._whole[name].cpu() if name in self._whole else self._start.read(name)

    def _dense(self, name: str) -> Tensor:
        factors = self._factors(name)
        if factors is not None:
            return factors.dense(self.dtype(name))
        return difference(self.whole(name), self._start.read(name))

    def _factors(self, name: str) -> LowRank | None:
        return self._adapted.added(name).copy() if name in self._adapted.adapted else None

    def content_hashes(self) -> tuple[str | None, str | None]:
        """Content hash of the start, which is read for it, and None: the sums of weights and what is added to them are never formed."""
        return content_hash({name: hash_values(self._hashed.read(name)) for name in self._names}), None


class AdaptedWeights(Source):
    """The whole weights that a start and an adapter make: sums in float64, rounded once to the start's dtype; trained copies as they are.

    Args:
        start: The weights the adapter was trained on.
        added: What the adapter adds to them.

    Attributes:
        base, added: Both.
    """

    def __init__(self, start: Source, added: AdapterDifference) -> None:
        self.base, self.added = start, added
        self.location, self.directory, self.config = added.location, start.directory, start.config

    @property
    def names(self) -> tuple[str, ...]:  # noqa: D102
        return self.base.names

    def shape(self, name: str) -> tuple[int, ...]:  # noqa: D102
        return self.base.shape(name)

    def dtype(self, name: str) -> torch.dtype:  # noqa: D102
        return self.base.dtype(name)

    def read(self, name: str) -> Tensor:  # noqa: D102
        factors = self.added.low_rank(name)
        if factors is None:
            return self.added.whole(name).to(self.dtype(name))
        return combine(self.base.read(name), [(factors, 1.0)], self.dtype(name))


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
        except Exception as error:
            # Whatever peft makes of a config that another release, or nobody, wrote.
            raise LayoutMismatchError(
                f"{directory} cannot be put onto the model of {start.label}: {' '.join(str(error).split())}"
            ) from error
        parameters = dict(model.named_parameters(remove_duplicate=False))
        # Each by an object of its own: tied parameters are one. Whether embeddings are stored is for the file to say (peft would ask the hub).
        marks = {name: parameter.detach() for name, parameter in parameters.items()}
        trained, stored = (get_peft_model_state_dict(model, state_dict=dict(marks), save_embedding_layers=along) for along in (False, True))
    name_of = {id(mark): name for name, mark in marks.items()}
    places = {key: name_of[id(mark)] for key, mark in stored.items()}
    loaded_too = {id(parameters[places[key]]) for key in held if key in places}
    missing = [key for key in trained if id(parameters[places[key]]) not in loaded_too]
    if missing:
        raise CorruptFileError(
            f"{directory / _WEIGHTS_NAME} lacks tensors that its config asks for, {first_three(missing)}. Copy or save it again."
        )
    foreign = set(held) - set(places)
    if foreign:
        raise LayoutMismatchError(f"{directory / _WEIGHTS_NAME} holds tensors that have no place in the model, {first_three(foreign)}")
    odd = [key for key, tensor in held.items() if tensor.shape != stored[key].shape]
    if odd:
        raise LayoutMismatchError(
            f"{directory / _WEIGHTS_NAME} has other shapes than its config and {start.label} ask for in {first_three(odd)}. Is it another model's?"
        )
    given = {places[key]: nn.Parameter(tensor, requires_grad=False) for key, tensor in held.items()}
    if config.get("ensure_weight_tying"):
        # Of tied weights the file holds the one trained copy under each name.
        copies = [name for name in given if ".modules_to_save." in name]
        given |= {name: next(given[twin] for twin in copies if torch.equal(given[twin], given[name])) for name in copies}
    # Loaded under one of its names, a tied parameter has to stay one tensor under all of them.
    by_parameter = {id(parameters[name]): loaded for name, loaded in given.items()}
    given |= {name: by_parameter[id(parameter)] for name, parameter in parameters.items() if id(parameter) in by_parameter}
    model.load_state_dict(given, strict=False, assign=True)
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
