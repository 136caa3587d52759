import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lata_lightning.errors import LataError, SourceError
from lata_lightning.evaluation.accuracy import exact_match
from lata_lightning.evaluation.answers import Answers
from lata_lightning.evaluation.harness import evaluate_tasks
from lata_lightning.quickstart.exercises import exercises
from lata_lightning.quickstart.experts import INSTRUCT

pytestmark = pytest.mark.filterwarnings("ignore")
TASK = """
task: own_words
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 12
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
CHOICES = """
task: own_choices
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{[answer, wrong]}}}}"
doc_to_target: 0
target_delimiter: ""
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(INSTRUCT)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(INSTRUCT)


@pytest.fixture
def task_file(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def written(template, rows):
        data, path = tmp_path / "rows.jsonl", tmp_path / "task.yaml"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        path.write_text(template.format(data=data))
        return str(path)

    return written


def test_a_task_file_asks_in_the_chat_format_and_agrees_with_exact_match(model, tokenizer, task_file):
    pytest.importorskip("lm_eval")
    pairs = [pair for skill in ("copy", "reverse") for pair in exercises(skill, "test", 3, seed=1)]
    file = task_file(TASK, [{"prompt": prompt, "answer": answer} for prompt, answer in pairs])
    model.train()
    found = evaluate_tasks(model, tokenizer, [file], chat=True)
    assert found["own_words"]["exact_match"] == exact_match(model, tokenizer, pairs) == pytest.approx(0.5)
    assert set(found["own_words"]) == {"exact_match", "exact_match_stderr"}
    assert model.training
    model.eval()
    assert evaluate_tasks(model, tokenizer, [file], chat=True, limit=3)["own_words"]["exact_match"] == 1


def test_multiple_choice_prefers_the_likelier_answer(model, tokenizer, task_file):
    pytest.importorskip("lm_eval")
    rows = [("copy tobik", "tobik", "tobim"), ("copy lemu", "lumo", "lemu"), ("twice ab", "xy", "zzz"), ("last tobik", "b", "k")]
    file = task_file(CHOICES, [{"prompt": prompt, "answer": answer, "wrong": wrong} for prompt, answer, wrong in rows])
    found = evaluate_tasks(model, tokenizer, [file], chat=True)

    def likelihood(prompt, answer):
        """Of the answer alone: the harness scores no end of turn."""
        (_, logits, wanted) = next(Answers(tokenizer, [(prompt, answer)]).predictions(model))
        tokens = wanted[0][wanted[0] >= 0][:-1]
        rows = logits[0, -len(tokens) - 1 : -1].log_softmax(-1)
        return rows[torch.arange(len(tokens)), tokens].sum().item()

    right = [likelihood(prompt, answer) > likelihood(prompt, wrong) for prompt, answer, wrong in rows]
    assert found["own_choices"]["acc"] == sum(right) / len(right)
    assert right[:2] == [True, False]


def test_what_the_harness_does_not_know_is_refused(model, tokenizer, task_file, tmp_path):
    pytest.importorskip("lm_eval")
    with pytest.raises(SourceError, match=r"no such task files: 1: \['absent.yaml'\]"):
        evaluate_tasks(model, tokenizer, ["absent.yaml"])
    with pytest.raises(SourceError, match=r"has no such tasks: 1: \['no_such_task'\]"):
        evaluate_tasks(model, tokenizer, ["no_such_task"])
    broken = tmp_path / "broken.yaml"
    broken.write_text("output_type: multiple_choice\n")
    with pytest.raises(LataError, match="lm-evaluation-harness cannot run these tasks"):
        evaluate_tasks(model, tokenizer, [str(broken)])
    missing = tmp_path / "missing.yaml"
    missing.write_text(TASK.format(data=tmp_path / "no.jsonl"))
    with pytest.raises(SourceError, match="the data of a task cannot be had"):
        evaluate_tasks(model, tokenizer, [str(missing)])


@pytest.mark.parametrize("allowed", [False, True])
def test_code_of_models_is_run_only_on_demand(model, tokenizer, monkeypatch, allowed):
    asked = {}
    harness = ModuleType("lm_eval")
    harness.simple_evaluate = lambda *_, **given: asked.update(given) or {"results": {}}
    models, tasks = ModuleType("lm_eval.models.huggingface"), ModuleType("lm_eval.tasks")
    models.HFLM = lambda **_: None
    tasks.TaskManager = lambda **_: SimpleNamespace(all_tasks=["humaneval"])
    for name, module in {"lm_eval": harness, "lm_eval.models.huggingface": models, "lm_eval.tasks": tasks}.items():
        monkeypatch.setitem(sys.modules, name, module)
    evaluate_tasks(model, tokenizer, ["humaneval"], **({"run_code": True} if allowed else {}))
    assert asked["confirm_run_unsafe_code"] is allowed


def test_without_the_harness_the_extra_is_named(model, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(LataError, match=r"pip install 'lata_lightning\[eval\]'"):
        evaluate_tasks(model, tokenizer, ["hellaswag"])


def test_no_tasks_are_refused(model, tokenizer):
    with pytest.raises(LataError, match="there is no task to evaluate"):
        evaluate_tasks(model, tokenizer, [])
