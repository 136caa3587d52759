"""What a run on real checkpoints compares: read from a YAML file, checked, and how much room it needs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch

from lata_lightning.errors import LataError, first_line, first_three
from lata_lightning.moments import Start, check_start
from lata_lightning.store.dtypes import float_dtype
from study.real.published.streamed import PAPER, check_methods, check_start_of
from study.real.ready import read_yaml

TOKENS_PER_BATCH = 4096
GRID = (0.1, 0.2, 0.3, 0.4, 0.55, 0.75, 1.0, 1.4)
Vocabulary = Literal["onto"]


_FILE_NAME = re.compile(r"^\w[\w.-]*$")


class Expert(NamedTuple):
    """One fine-tuned model.

    Attributes:
        model: Directory or hub id.
        domain: Name of the held-out text that shows what it has learned.
    """

    model: str
    domain: str


class Source(NamedTuple):
    """A data set of the hub, or a local one in the form of the hub's, that a held-out text is made from.

    Attributes:
        dataset: What ``datasets.load_dataset`` takes: a hub id, a directory, or a file.
        validation, test: Splits, slices such as ``"train[-300:]"`` among them.
        subset: Configuration of a data set that has several.
        prompt, answer: Columns of questions and answers.
        text: Column of raw text instead; its rows are joined in their order, every one a line.
    """

    dataset: str
    validation: str
    test: str
    subset: str | None = None
    prompt: str | None = None
    answer: str | None = None
    text: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """Those that are read: one of raw text, or prompt and answer."""
        return tuple(column for column in (self.text, self.prompt, self.answer) if column is not None)


class Needs(NamedTuple):
    """Room a run takes, in bytes, and how often it writes a model.

    Attributes:
        parameters: Of one model.
        model: Bytes of one model on disk, and of its weights where it is scored.
        disk: All models of the configuration and one merged one.
        logits: Logits of one batch where text is scored, as the model gives them, in float32, and their logarithms.
        merges: Merged models that are written at most, one after the other.
    """

    parameters: int
    model: int
    disk: int
    logits: int
    merges: int


@dataclass(frozen=True)
class Configuration:
    """The content of a configuration file.

    Attributes:
        name: Of the file.
        base, instruct: Directory or hub id.
        experts: By name.
        start: What the experts were fine-tuned from.
        methods: Names of ``STREAMED``; those of ``PAPER`` unless given.
        scales: Grid of scales, the same for every method; scale 0 is scored in any case.
        kept: Names of held-out texts that nobody was tuned on, as a measure of what is kept.
        texts: By name of the text the data set it is made from, where no folder is given.
        tasks: Of lm-evaluation-harness, by name or as files.
        chat: Whether tasks are asked in the chat format.
        dtype: Precision to run and to merge in.
        vocabulary: ``"onto"`` leaves out rows of the vocabulary that only an expert has; by default such experts are refused.
        context_length: Tokens of a window of held-out text.
        architecture: The transformers configuration of the models, for what room they need and for tiny models of the same kind.
    """

    name: str
    base: str
    instruct: str
    experts: Mapping[str, Expert]
    start: Start = "instruct"
    methods: tuple[str, ...] = PAPER
    scales: tuple[float, ...] = GRID
    kept: tuple[str, ...] = ()
    texts: Mapping[str, Source] = field(default_factory=dict)
    tasks: tuple[str, ...] = ()
    chat: bool = False
    dtype: str = "bfloat16"
    vocabulary: Vocabulary | None = None
    context_length: int = 2048
    architecture: Mapping[str, Any] | None = None

    @property
    def models(self) -> dict[str, str]:
        """Directory or hub id of every model, by ``base``, ``instruct`` or the expert's name."""
        return {"base": self.base, "instruct": self.instruct, **{name: expert.model for name, expert in self.experts.items()}}

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of all held-out texts, each once."""
        return tuple(dict.fromkeys([*(expert.domain for expert in self.experts.values()), *self.kept]))

    def identity(self) -> dict[str, Any]:
        """What results depend on besides weights and texts; methods and scales may be added to results that are there."""
        left_out = {"methods", "scales", "tasks", "texts", "architecture"}
        return {key: value for key, value in asdict(self).items() if key not in left_out} | {
            "experts": {name: list(expert) for name, expert in self.experts.items()},
            "kept": list(self.kept),
        }


def read_configuration(path: str | Path) -> Configuration:
    """A configuration from a file, or a ready one by its name.

    Raises:
        SourceError: There is no such file, and no ready configuration of that name.
        LataError: The file is no YAML, or a key is unknown, missing, or of the wrong kind; the message names it.
    """
    file, content = read_yaml(path)
    known = {field.name for field in fields(Configuration)} - {"name"}
    unknown, missing = set(map(str, content)) - known, {"base", "instruct", "experts"} - set(content)
    if unknown:
        raise LataError(f"{file} has unknown keys, {first_three(unknown)}; known are {', '.join(sorted(known))}")
    if missing:
        raise LataError(f"{file} lacks keys that every configuration needs, {first_three(missing)}")
    return checked(
        Configuration(
            **{
                **content,
                "name": file.stem,
                "experts": _experts(file, content["experts"]),
                "texts": _sources(file, content.get("texts") or {}),
            }
        )
    )


def checked(configuration: Configuration) -> Configuration:
    """The configuration with lists as tuples, if every value is of its kind.

    Raises:
        LataError: One is not; the message names the key and what arrived.
    """
    found = {field.name: getattr(configuration, field.name) for field in fields(Configuration)}
    for key in ("base", "instruct", "dtype"):
        _check(key, found[key], isinstance(found[key], str) and found[key], "a text")
    for key in ("methods", "kept", "tasks"):
        _check(key, found[key], _listed(found[key], str), "a list of names")
        found[key] = tuple(found[key])
    scales = found["scales"]
    _check("scales", scales, _listed(scales, int | float) and scales and all(math.isfinite(scale) for scale in scales), "a list of numbers")
    # Zero is no merge: it is the model that is merged onto, and scored as that.
    found["scales"] = tuple(sorted({float(scale) for scale in scales} - {0.0}))
    _check("chat", found["chat"], isinstance(found["chat"], bool), "true or false")
    length = found["context_length"]
    _check("context_length", length, isinstance(length, int) and length > 1, "a whole number from 2 on")
    _check("vocabulary", found["vocabulary"], found["vocabulary"] in (None, *get_args(Vocabulary)), "'onto' or left out")
    shape = found["architecture"]
    _check("architecture", shape, shape is None or (isinstance(shape, dict) and "model_type" in shape), "a transformers configuration")
    odd = [name for name in (*found["experts"], *configuration.domains) if not _FILE_NAME.match(name)]
    if odd:
        raise LataError(
            f"experts and domains become file names, so they are of letters, digits, dots and dashes; others are {first_three(odd)}"
        )
    check_start(found["start"])
    float_dtype(found["dtype"])
    check_methods(found["methods"])
    check_start_of(found["methods"], found["start"])
    return Configuration(**found)


def with_models(configuration: Configuration, base: str | None, instruct: str | None, experts: Sequence[str]) -> Configuration:
    """The configuration with other models in the place of some of its own.

    Args:
        configuration: Stays as it is.
        base: Directory or hub id.
        instruct: The same.
        experts: ``NAME=MODEL`` each, for experts the configuration names.

    Raises:
        LataError: One is not of that form, or names no expert.
    """
    given = dict(configuration.experts)
    for text in experts:
        name, mark, model = text.partition("=")
        if not mark or not model or name not in given:
            raise LataError(f"--expert takes NAME=MODEL with one of {', '.join(given)}, got {text!r}")
        given[name] = given[name]._replace(model=model)
    changed: dict[str, Any] = {key: value for key, value in (("base", base), ("instruct", instruct)) if value is not None}
    return replace(configuration, experts=given, **changed)


def needs(configuration: Configuration) -> Needs:
    """What a run takes, counted on a model without weights.

    Raises:
        LataError: The configuration says nothing of the architecture, or transformers does not know it.
    """
    model = empty_model(configuration)
    width = float_dtype(configuration.dtype).itemsize
    parameters = sum(parameter.numel() for parameter in model.parameters())
    # The whole grid for validation, then scale 1 and the chosen scale for test.
    merges = len(configuration.methods) * (len(configuration.scales) + 2)
    return Needs(
        parameters=parameters,
        model=parameters * width,
        disk=parameters * width * (len(configuration.models) + 1),
        logits=TOKENS_PER_BATCH * int(model.config.vocab_size) * (width + 4 + 4),
        merges=merges,
    )


def empty_model(configuration: Configuration) -> Any:
    """The model of the configuration's architecture, on the meta device.

    Raises:
        LataError: As for ``needs``.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if configuration.architecture is None:
        raise LataError(f"the configuration {configuration.name} says nothing of the architecture; give it the key 'architecture'")
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(**configuration.architecture))
    except (ValueError, TypeError) as error:
        raise LataError(f"transformers has no such architecture as that of {configuration.name}: {first_line(error)}") from error


def _experts(file: Path, content: Any) -> dict[str, Expert]:
    wanted = set(Expert._fields)
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(entry, dict) and set(entry) == wanted for entry in content.values())
    ):
        raise LataError(f"{file} must give under 'experts' a name for each, and for each name the keys {', '.join(Expert._fields)}")
    taken = {"base", "instruct"} & set(content)
    if taken:
        raise LataError(f"{file} names an expert {first_three(taken)}, which is the name of another model of the configuration")
    return {str(name): Expert(str(entry["model"]), str(entry["domain"])) for name, entry in content.items()}


def _sources(file: Path, content: Any) -> dict[str, Source]:
    if not isinstance(content, dict) or not all(isinstance(entry, dict) for entry in content.values()):
        raise LataError(f"{file} must give under 'texts' keys and values for each name of a text")
    needed = set(Source._fields) - set(Source._field_defaults)
    found = {}
    for name, entry in content.items():
        given = set(map(str, entry))
        if not needed <= given <= set(Source._fields) or not all(isinstance(value, str) for value in entry.values()):
            raise LataError(
                f"{file} must give for the text {name!r} {', '.join(sorted(needed))}, may give {', '.join(Source._field_defaults)}, all of them texts, "
                f"and gives {', '.join(sorted(given))}"
            )
        if given & {"text", "prompt", "answer"} not in ({"text"}, {"prompt", "answer"}):
            raise LataError(f"{file} must name for the text {name!r} either the column 'text', or the columns 'prompt' and 'answer'")
        found[str(name)] = Source(**entry)
    return found


def _listed(value: Any, kind: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(entry, kind) and not isinstance(entry, bool) for entry in value)


def _check(key: str, value: Any, good: object, wanted: str) -> None:
    if not good:
        raise LataError(f"the key {key!r} of a configuration must be {wanted}, it is {value!r}")
