"""Peft adapter directories: their files, and the model that these and the config of the start describe."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lata_lightning.errors import CorruptFileError, LataError, LayoutMismatchError, SourceError, first_three
from lata_lightning.store.adapter_layers import check_kind
from lata_lightning.store.directories import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_object
from lata_lightning.store.formats.table import find_format
from lata_lightning.store.lora import RESIDUAL, AdaptedModel
from lata_lightning.store.meaning import rows_of
from lata_lightning.store.meta_model import meta_model
from lata_lightning.store.sources import Origin, TensorSource

# The models with a head that adapters of a task type are trained on.
_HEADS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
_AUTO_CLASSES = {
    **_HEADS,
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
# Kinds whose layers have tensors that no file stores: drawn from a seed, or computed from the sizes.
_WITH_BUFFERS = frozenset({"ADALORA", "OFT", "BOFT", "VERA", "TRAINABLE_TOKENS"})


def named_base(directory: Path) -> str | None:
    """Return the location that the config of an adapter gives for the weights it was trained on; None if it gives none.

    Raises:
        CorruptFileError: The config cannot be read, or gives something else than a text.
    """
    named = read_object(directory / ADAPTER_CONFIG).get("base_model_name_or_path") or None
    if named is not None and not isinstance(named, str):
        raise CorruptFileError(f"{directory / ADAPTER_CONFIG} must name its base model by a text, it holds {named!r}")
    return named


def adapted_model(start: TensorSource, directory: Path) -> AdaptedModel:
    """Build the meta model that the config of the start describes, with the tensors of an adapter directory in it.

    Tensors saved under names of an older release of transformers are renamed as peft renames them when it loads them.

    Raises:
        SourceError: The kind of adapter is not supported, the first values of its factors are not known, or transformers does not know the
            architecture of the start.
        LayoutMismatchError: It belongs to a model with other layers.
        CorruptFileError: Its files cannot be read, or lack tensors.
    """
    config = read_object(directory / ADAPTER_CONFIG)
    if str(config.get("init_lora_weights")).startswith(RESIDUAL):
        raise SourceError(
            f"{directory} was initialised by {config['init_lora_weights']}, which changes the base weights, and does not hold what its factors started "
            "with. Save it with save_pretrained(…, path_initial_model_for_weight_conversion=…), or merge_and_unload() it and extract from that."
        )
    if start.config is None or meta_model(start.config) is None:
        raise SourceError(
            f"{start.label} must be a Hugging Face directory of an architecture that transformers knows, to find the layers that {directory} adapts"
        )
    tensors, errors = _read_weights(directory), []
    for described in _candidates(start.config, config, tensors):
        module = meta_model(described)
        if module is None:
            continue
        try:
            model = _wrapped(module, directory, config, start.label)
            _fill(model, _under_current_names(model, tensors, directory), directory, config, start.label)
        except (LayoutMismatchError, CorruptFileError) as error:
            errors.append(error)
            continue
        try:
            return AdaptedModel(model)
        except LataError as error:
            raise SourceError(f"{directory}: {error}") from error
    # The model that is most likely meant comes first.
    raise errors[0]


def _candidates(start: Mapping[str, Any], config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[Mapping[str, Any]]:
    """Yield configs of the models that an adapter may have been trained on, the most likely first: the start may lack their head, or have another.

    Args:
        start: Config of the start.
        config: Content of adapter_config.json.
        tensors: The tensors of the adapter.
    """
    # An adapter without a task type names the class it was trained on.
    trained_on = (config.get("auto_mapping") or {}).get("base_model_class")
    classes = [trained_on, next(iter(start.get("architectures") or ()), None)]
    classes += [_class_for(task, start) for task in (str(config.get("task_type")), "FEATURE_EXTRACTION")]
    # Heads are saved whole: how many labels they have is the length of one of their tensors.
    saved = set(config.get("modules_to_save") or ())
    labels = sorted({tensor.shape[0] for name, tensor in tensors.items() if tensor.dim() and saved & set(name.split("."))})
    for name in dict.fromkeys(name for name in classes if name is not None):
        model = {**start, "architectures": [name]}
        yield model
        for count in labels:
            yield {**model, "id2label": {str(label): f"LABEL_{label}" for label in range(count)}}


def _class_for(task: str, config: Mapping[str, Any]) -> str | None:
    """Return the name of the class that transformers has for a task and a type of model; None if it has none."""
    import transformers

    kind = config.get("model_type")
    if task not in _AUTO_CLASSES or kind not in transformers.CONFIG_MAPPING:
        return None
    mapping = getattr(transformers, _AUTO_CLASSES[task])._model_mapping
    known = transformers.CONFIG_MAPPING[kind]
    return mapping[known].__name__ if known in mapping else None


def _wrapped(module: nn.Module, directory: Path, config: Mapping[str, Any], label: str) -> Any:
    """Return the meta model with meta adapters on it."""
    from peft import PeftConfig, PeftModel, PeftType

    kind = config.get("peft_type")
    if kind not in list(PeftType):
        raise SourceError(f"{directory} is an adapter of the type {kind}, which this release of peft does not know")
    with warnings.catch_warnings():
        # The warnings of peft about a meta model concern training it.
        warnings.simplefilter("ignore")
        try:
            settings = PeftConfig.from_pretrained(directory)
        except Exception as error:
            # Peft may raise any error on a config that another release or a person wrote.
            raise LayoutMismatchError(f"{directory / ADAPTER_CONFIG} is no config that peft can use: {_on_one_line(error)}") from error
        try:
            check_kind(directory.name, settings)
        except LataError as error:
            raise SourceError(f"{directory}: {error}") from error
        try:
            if kind not in _WITH_BUFFERS:
                return PeftModel(module, settings, low_cpu_mem_usage=True)
            with torch.random.fork_rng([]), _on_cpu(module):
                return PeftModel(module, settings)
        except Exception as error:
            raise LayoutMismatchError(f"{directory} cannot be put onto the model of {label}: {_on_one_line(error)}") from error


@contextmanager
def _on_cpu(module: nn.Module) -> Iterator[None]:
    """Give a meta model parameters on the CPU that take no memory, inside the block: peft puts the buffers of an adapter on their device."""
    empty = {id(parameter): parameter for parameter in module.requires_grad_(False).parameters()}
    on_cpu = {key: nn.Parameter(torch.zeros((), dtype=one.dtype).expand(one.shape), requires_grad=False) for key, one in empty.items()}
    _exchange(module, on_cpu)
    try:
        yield
    finally:
        _exchange(module, {id(on_cpu[key]): one for key, one in empty.items()})


def _exchange(module: nn.Module, others: Mapping[int, nn.Parameter]) -> None:
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) in others:
                part.register_parameter(name, others[id(parameter)])


def _under_current_names(model: Any, tensors: dict[str, Tensor], directory: Path) -> dict[str, Tensor]:
    """Return the tensors of an adapter file under the names that peft gives them when it loads them onto a model."""
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    try:
        return dict(convert_peft_adapter_state_dict_for_transformers(model, model.active_peft_config, tensors, model.active_adapter))
    except Exception as error:
        raise LayoutMismatchError(f"peft cannot rename the tensors of {directory} for this model: {_on_one_line(error)}") from error


def _fill(model: Any, tensors: Mapping[str, Tensor], directory: Path, config: Mapping[str, Any], label: str) -> None:
    """Put the tensors of an adapter file into the meta model, each where peft would load it."""
    from peft import get_peft_model_state_dict

    parameters = model.state_dict(keep_vars=True)
    # One object for each name, as tied parameters are one. The file says whether embeddings are stored (peft would ask the hub).
    marks = {name: parameter.detach() for name, parameter in parameters.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained, stored = (
            get_peft_model_state_dict(model, state_dict=dict(marks), save_embedding_layers=along)
            for along in (False, _has_embeddings(model))
        )
    name_of = {id(mark): name for name, mark in marks.items()}
    path_of = {key: name_of[id(mark)] for key, mark in stored.items()}
    loaded_too = {id(parameters[path_of[key]]) for key in tensors if key in path_of}
    missing = [key for key in trained if id(parameters[path_of[key]]) not in loaded_too]
    if missing:
        raise CorruptFileError(f"{directory} lacks tensors that its config asks for, {first_three(missing)}. Copy or save it again.")
    foreign = set(tensors) - set(path_of)
    if foreign:
        head = _HEADS.get(str(config.get("task_type")))
        advice = (
            f" It was trained on a {head}: save the start as one, with as many labels, by transformers.{head}.from_pretrained({label!r}, "
            "num_labels=…).save_pretrained(DIR), give DIR as START, and leave the head out of the vector (--leave-out)."
            if head
            else ""
        )
        raise LayoutMismatchError(f"{directory} holds tensors that the model of {label} does not have, {first_three(foreign)}.{advice}")
    odd = [key for key, tensor in tensors.items() if tensor.shape != stored[key].shape]
    rows = rows_of(model.get_base_model().config.to_dict())
    resized = {tensors[key].shape[0] for key in odd if stored[key].shape[0] == rows and tensors[key].shape[1:] == stored[key].shape[1:]}
    if len(resized) == 1:
        count = resized.pop()
        raise LayoutMismatchError(
            f"{directory} was trained on a model with {count} rows of tokens, and {label} has {rows}: load that, resize_token_embeddings({count}), "
            "save it with the tokenizer of the adapter, and give it as START."
        )
    if odd:
        raise LayoutMismatchError(
            f"{directory} does not have the shapes that its config and {label} ask for in {first_three(odd)}. Does it belong to another model?"
        )
    buffers = dict(model.named_buffers(remove_duplicate=False))
    by_path = {path_of[key]: tensor for key, tensor in tensors.items()}
    given: dict[str, Tensor] = {
        path: tensor if path in buffers else nn.Parameter(tensor, requires_grad=False) for path, tensor in by_path.items()
    }
    if config.get("ensure_weight_tying"):
        # The file has the trained copy of tied weights under each of their names.
        copies = [name for name in given if ".modules_to_save." in name]
        given |= {name: next(given[twin] for twin in copies if torch.equal(given[twin], given[name])) for name in copies}
    # A tied parameter that is loaded under one of its names must stay one tensor under all of them.
    by_parameter = {id(parameters[name]): loaded for name, loaded in given.items()}
    given |= {name: by_parameter[id(parameter)] for name, parameter in parameters.items() if id(parameter) in by_parameter}
    model.load_state_dict(given, strict=False, assign=True)


def _has_embeddings(model: Any) -> bool:
    """Return whether a model tells which tensors are its embeddings; most models of images do not."""
    try:
        model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return False
    return True


def _on_one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _read_weights(directory: Path) -> dict[str, Tensor]:
    path = next((directory / name for name in ADAPTER_WEIGHTS if (directory / name).is_file()), None)
    if path is None:
        raise SourceError(f"{directory} holds neither {' nor '.join(ADAPTER_WEIGHTS)}. Is it complete?")
    stored = find_format(path).open(path, Origin(str(path)), None)
    return {name: stored.read(name) for name in stored.names} | {alias: stored.read(name) for alias, name in stored.tied.items()}
