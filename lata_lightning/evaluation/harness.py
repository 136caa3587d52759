"""Running tasks of lm-evaluation-harness, from its own collection or from files. Needs the extra ``eval``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lata_lightning.errors import LataError, SourceError, first_three
from lata_lightning.evaluation.modes import evaluating


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat: bool = False,
    batch_size: int = 8,
    run_code: bool = False,
) -> dict[str, dict[str, float]]:
    """Return the scores of a model by task and metric, as the harness names them (``acc``, ``exact_match``, …), including standard errors.

    Args:
        model: Hugging Face causal language model; it is not changed.
        tokenizer: Tokenizer of the model.
        tasks: Names of tasks, groups or tags of the harness, or paths of files with one task each (``.yaml``). A file may name functions of Python
            files beside it, which are then run.
        limit: Use only the first so many examples of each task.
        num_fewshot: Number of examples before each question; by default that of the task.
        chat: Use the tokenizer's chat format.
        batch_size: Rows per batch.
        run_code: Allow tasks that run code written by the model, such as ``humaneval``, on this machine and as this user. They also need the
            environment variable HF_ALLOW_CODE_EVAL to be 1.

    Returns:
        By task (and group), then by metric; where a task filters answers, by ``metric,filter`` for filters other than ``none``. Under ``n`` stands how
        many examples a task was scored on.

    Raises:
        SourceError: A task is unknown, or its file or its data cannot be read.
        LataError: The harness is not installed, no task is given, or a task cannot be run.
    """
    if not tasks:
        raise LataError("there is no task to evaluate: give at least one")
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise LataError(f"tasks need lm-evaluation-harness ({error}): pip install 'lata_lightning[eval]'") from error
    files = [task for task in tasks if task.endswith((".yaml", ".yml"))]
    missing = [file for file in files if not Path(file).is_file()]
    if missing:
        raise SourceError(f"there are no such task files: {first_three(missing)}")
    # Indexing the harness's own collection takes seconds, and task files do not need it.
    manager = TaskManager(include_defaults=len(files) < len(tasks))
    unknown = [task for task in tasks if task not in files and task not in manager.all_tasks]
    if unknown:
        raise SourceError(
            f"lm-evaluation-harness has no such tasks: {first_three(unknown)}. lm-eval ls tasks lists them; a task file ends in .yaml."
        )
    wanted = [str(Path(task).absolute()) if task in files else task for task in tasks]
    try:
        with evaluating(model):
            results = simple_evaluate(
                HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                tasks=wanted,
                task_manager=manager,
                limit=limit,
                num_fewshot=num_fewshot,
                apply_chat_template=chat,
                log_samples=False,
                confirm_run_unsafe_code=run_code,
            )
    except (OSError, ConnectionError) as error:
        raise SourceError(
            f"the data of a task cannot be had ({type(error).__name__}: {error}). Offline, give a task file with local data."
        ) from error
    except (KeyError, ValueError, TypeError) as error:
        raise LataError(f"lm-evaluation-harness cannot run these tasks: {type(error).__name__}: {error}") from error
    counts = results.get("n-samples", {})
    return {task: {**_figures(row), **_count(counts.get(task))} for task, row in results["results"].items()}


def _count(samples: dict[str, int] | None) -> dict[str, float]:
    return {} if samples is None else {"n": float(samples["effective"])}


def _figures(row: dict[str, Any]) -> dict[str, float]:
    numbers = {name: float(value) for name, value in row.items() if isinstance(value, int | float) and "," in name}
    return {name.removesuffix(",none"): value for name, value in numbers.items()}
