"""How a model is scored: loss on held-out texts, how much of the experts' gains that keeps, and tasks of lm-evaluation-harness."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from lata_lightning.errors import LataError, SourceError, first_line, first_three
from lata_lightning.evaluation.answers import AnswerPerplexity
from lata_lightning.evaluation.harness import evaluate_tasks
from lata_lightning.evaluation.perplexity import Perplexity
from lata_lightning.evaluation.questions import read_questions
from lata_lightning.store.dtypes import float_dtype
from lata_lightning.training.loading import load_causal_lm
from study.real.published.configuration import TOKENS_PER_BATCH, Configuration

Split = Literal["validation", "test"]
SPLITS: tuple[Split, ...] = ("validation", "test")
Losses = Mapping[str, float | None]
"""Held-out loss by domain, in nats per token; None where it is no finite number, as of a model that a large scale has destroyed."""
RUNS_CODE = ("humaneval", "mbpp")


class HeldOut:
    """The loss of models on held-out texts, which are read and turned into tokens once.

    Args:
        tokenizer: Of the instruct model; all models of a configuration share its tokens.
        folder: With the folders ``validation`` and ``test``, and in both a file for each domain: ``DOMAIN.jsonl`` with rows of prompt and answer, of which
            the answers are scored, or ``DOMAIN.txt``.
        domains: Names of the texts.
        context_length: Tokens of a window of raw text.

    Raises:
        SourceError: A file is missing.
        LataError: A text is the same in both folders, too short, or has rows of another form.
    """

    def __init__(self, tokenizer: Any, folder: Path, domains: Sequence[str], context_length: int) -> None:
        self.files = text_files(folder, domains)
        self._losses: dict[Split, dict[str, Callable[[Any], float]]] = {
            split: {domain: self._loss(tokenizer, path, context_length) for domain, path in files.items()}
            for split, files in self.files.items()
        }

    def __call__(self, model: Any, split: Split) -> dict[str, float | None]:
        """Loss by domain, in nats per token."""
        found = {domain: loss(model) for domain, loss in self._losses[split].items()}
        return {domain: value if math.isfinite(value) else None for domain, value in found.items()}

    @staticmethod
    def _loss(tokenizer: Any, path: Path, context_length: int) -> Callable[[Any], float]:
        if path.suffix == ".txt":
            perplexity: Any = Perplexity(tokenizer, path.read_text("utf-8"), context_length, TOKENS_PER_BATCH)
        else:
            perplexity = AnswerPerplexity(tokenizer, [(question.prompt, question.answer) for question in read_questions(path)])
        return lambda model: math.log(perplexity(model))


def text_files(folder: Path, domains: Sequence[str]) -> dict[Split, dict[str, Path]]:
    """The file of every domain in both folders.

    Raises:
        SourceError: One is missing.
        LataError: One is the same in both.
    """
    found: dict[Split, dict[str, Path]] = {split: {} for split in SPLITS}
    missing = []
    for split in SPLITS:
        for domain in domains:
            paths = [folder / split / f"{domain}{ending}" for ending in (".jsonl", ".txt")]
            held = [path for path in paths if path.is_file()]
            missing += [] if held else [str(paths[0])]
            found[split][domain] = held[0] if held else paths[0]
    if missing:
        raise SourceError(
            f"there are no held-out texts {first_three(missing)}, nor with .txt. Every domain needs one in validation and in test."
        )
    same = [domain for domain in domains if len({digest(found[split][domain]) for split in SPLITS}) == 1]
    if same:
        raise LataError(f"scales are chosen on validation and judged on test, so the texts must differ; the same are {first_three(same)}")
    return found


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def gains(reference: Mapping[str, Losses], configuration: Configuration) -> dict[str, float | None]:
    """By how many nats each expert predicts its own domain better than instruct does; None where a loss is no number."""
    found: dict[str, float | None] = {}
    for name, expert in configuration.experts.items():
        before, after = reference["instruct"][expert.domain], reference[name][expert.domain]
        found[name] = None if before is None or after is None else before - after
    return found


def kept(losses: Losses, reference: Mapping[str, Losses], configuration: Configuration) -> float | None:
    """Share of the experts' gains that a model keeps, averaged over the experts that have one: 0 for instruct, 1 for all of it.

    Args:
        losses: Of the model.
        reference: Losses of ``instruct`` and of every expert on the same texts.
        configuration: Says which domain shows what an expert has learned.

    Returns:
        None where no expert has a gain, or a loss is no number.
    """
    shares = []
    for name, gain in gains(reference, configuration).items():
        domain = configuration.experts[name].domain
        before, after = reference["instruct"][domain], losses[domain]
        if after is None:
            return None
        if gain is not None and gain > 0 and before is not None:
            shares.append((before - after) / gain)
    return sum(shares) / len(shares) if shares else None


def score_tasks(
    model: Any, tokenizer: Any, tasks: Iterable[str], configuration: Configuration, *, limit: int | None, run_code: bool
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Scores of lm-evaluation-harness by task, and why a task was passed over.

    Args:
        model: Where it is to run.
        tokenizer: Of the instruct model.
        tasks: Names or files.
        configuration: Whether to ask in the chat format.
        limit: Only so many examples of each.
        run_code: Whether tasks may run the code that models write.
    """
    found: dict[str, dict[str, float]] = {}
    skipped: dict[str, str] = {}
    for task in tasks:
        if Path(task).stem.startswith(RUNS_CODE) and not run_code:
            skipped[task] = "it runs code that models write, on this machine and as this user; --run-code allows it"
            continue
        if run_code:
            # What the metric of these tasks asks for besides.
            os.environ["HF_ALLOW_CODE_EVAL"] = "1"
        try:
            scores = evaluate_tasks(model, tokenizer, [task], limit=limit, chat=configuration.chat, run_code=run_code)
        except LataError as error:
            skipped[task] = first_line(error)
            continue
        found[task] = {f"{name}/{metric}": value for name, row in scores.items() for metric, value in row.items() if math.isfinite(value)}
    return found, skipped


def open_model(path: str, dtype: str, device: str | None) -> Any:
    """A causal language model in evaluation mode on its device; by default a GPU if there is one.

    Raises:
        SourceError: It cannot be loaded, or there is no such device.
    """
    float_dtype(dtype)
    model = load_causal_lm(path, dtype)
    try:
        return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    except (RuntimeError, AssertionError) as error:
        raise SourceError(f"the model cannot be put on the device {device!r}: {first_line(error)}") from error


def release(model: Any) -> None:
    """Give back the memory of a model's weights at once, whoever still holds the model; it cannot be used afterwards."""
    model.to("meta")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def write_texts(folder: Path, texts: Mapping[Split, Mapping[str, str | Sequence[tuple[str, str]]]]) -> None:
    """Write held-out texts in the form ``HeldOut`` reads: pairs as JSONL, texts as they are."""
    for split, domains in texts.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        for domain, content in domains.items():
            if isinstance(content, str):
                (folder / split / f"{domain}.txt").write_text(content, "utf-8")
            else:
                rows = (json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=False) for prompt, answer in content)
                (folder / split / f"{domain}.jsonl").write_text("\n".join(rows) + "\n", "utf-8")
