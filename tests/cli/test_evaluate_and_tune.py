import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from scipy.stats import binomtest
from tokenizers_of_kinds import bert
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForSequenceClassification

from lata_lightning.cli.main import main, parser_of
from lata_lightning.cli.scores import Row, by_metric, of_tasks
from lata_lightning.evaluation import tuning, unlearning_measures
from lata_lightning.evaluation.accuracy import exact_match
from lata_lightning.evaluation.intervals import Score
from lata_lightning.evaluation.metric_names import METRICS
from lata_lightning.evaluation.perplexity import perplexity
from lata_lightning.layers import LEVELS
from lata_lightning.linearity.methods import METHODS
from lata_lightning.quickstart.exercises import exercises
from lata_lightning.quickstart.experts import BASE, INSTRUCT
from lata_lightning.vectors.aligning import align
from lata_lightning.vectors.task_vector import TaskVector
from lata_lightning.weighting import WEIGHTINGS

TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife. " * 2
SKILLS = {skill: exercises(skill, "test", 6, seed=1) for skill in ("copy", "twice")}


@pytest.fixture
def lata(monkeypatch, tmp_path, capsys):
    """Runs a command in a fresh directory with the shipped models and some data; gives exit status, standard output and standard error."""
    for name, path in {"base": BASE, "instruct": INSTRUCT}.items():
        (tmp_path / name).symlink_to(path)
    for skill, pairs in SKILLS.items():
        (tmp_path / f"{skill}.jsonl").write_text(
            "".join(json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in pairs)
        )
    (tmp_path / "prose.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    monkeypatch.chdir(tmp_path)

    def run(line):
        try:
            status = main(shlex.split(line))
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


def scores_of(path, *skills):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(INSTRUCT)
    return [exact_match(model, tokenizer, SKILLS[skill]) for skill in skills]


def test_choices_spelled_out_are_those_of_the_library():
    types = {name: parser_of(name).types for name in ("tune", "evaluate")}
    assert get_args(types["tune"]["weighting"]) == WEIGHTINGS
    assert get_args(types["tune"]["level"]) == LEVELS
    assert get_args(types["tune"]["method"]) == METHODS
    assert parser_of("tune").get_default("keep") == tuning.CONTROL_SHARE
    assert {get_args(found["metric"]) for found in types.values()} == {METRICS}


def test_evaluate_scores_files_and_writes_them(lata):
    status, printed, _ = lata("evaluate instruct --data copy.jsonl twice.jsonl --format json --output scores")
    assert status == 0
    right = scores_of(INSTRUCT, "copy", "twice")
    found = json.loads(printed)
    for name, value in zip(("copy", "twice"), right, strict=True):
        low, high = binomtest(round(6 * value), 6).proportion_ci(method="wilson")
        assert found[name]["exact_match"] == value
        assert found[name]["n"] == 6
        assert found[name]["intervals"]["exact_match"] == pytest.approx([low, high])
    assert right[0] == 1
    kept = json.loads(open_text("scores/scores.json"))
    assert kept["model"] == "instruct"
    assert kept["scores"] == {"copy": {"exact_match": right[0]}, "twice": {"exact_match": right[1]}}
    assert kept["sample"] == {name: {"n": 6, "intervals": row["intervals"]} for name, row in found.items()}
    status, _, said = lata("evaluate instruct --data copy.jsonl --output scores")
    assert (status, "scores/scores.json exists already" in said) == (1, True)


def open_text(path):
    return Path(path).read_text("utf-8")


def test_several_models_and_metrics_stand_in_one_table(lata):
    line = "evaluate base instruct --data copy.jsonl --metric exact_match perplexity"
    status, printed, _ = lata(line)
    assert status == 0
    cells = [row.split() for row in printed.splitlines() if row.split()[:1] in (["base"], ["instruct"])]
    assert [row[0] for row in cells] == ["base", "instruct", "base", "instruct"]
    assert cells[0][1:3] == ["copy", "exact_match"]
    assert cells[2][1:3] == ["copy", "perplexity"]
    found = json.loads(lata(f"{line} --format json")[1])
    assert [float(row[-5 if "–" in row else -3]) for row in cells] == pytest.approx(
        [found[model]["copy"][metric] for metric in ("exact_match", "perplexity") for model in ("base", "instruct")], rel=1e-3
    )
    assert found["instruct"]["copy"]["exact_match"] == scores_of(INSTRUCT, "copy")[0]
    status, _, said = lata(f"{line} --output scores")
    assert (status, "--output keeps the scores of one model, and 2 are given" in said) == (1, True)
    status, _, said = lata("evaluate base instruct --forget copy.jsonl --output out")
    assert (status, "one model at a time; 2 are given" in said) == (1, True)


def test_standard_errors_of_tasks_become_intervals():
    rows = of_tasks("model", {"arc": {"acc": 0.5, "acc_stderr": 0.1, "acc,strict": 0.4, "n": 20.0}})
    assert rows[0] == Row("model", "arc", "acc", 0.5, 20, pytest.approx((0.304, 0.696)))
    assert rows[2] == Row("model", "arc", "acc,strict", 0.4, 20, None)
    assert by_metric(rows) == {"arc": {"acc": 0.5, "acc_stderr": 0.1, "acc,strict": 0.4}}


def test_evaluate_gives_the_perplexity_of_text(lata):
    status, printed, _ = lata("evaluate base --data prose.jsonl --metric perplexity --context-length 32 --format json")
    assert status == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(BASE), AutoTokenizer.from_pretrained(BASE)
    assert json.loads(printed)["prose"]["perplexity"] == pytest.approx(perplexity(model, tokenizer, TEXT, 32))
    status, printed, _ = lata("evaluate base --data prose.jsonl --metric perplexity --dtype bfloat16")
    assert status == 0
    assert "prose" in printed
    assert "perplexity" in printed


def test_a_score_that_is_no_number_is_null(lata, monkeypatch):
    infinite = SimpleNamespace(score=lambda model: Score(float("inf"), 1, None))
    monkeypatch.setattr("lata_lightning.evaluation.questions.prepare", lambda *_, **__: infinite)
    status, printed, _ = lata("evaluate base --data prose.jsonl --metric perplexity --format json --output out")
    assert status == 0
    assert json.loads(open_text("out/scores.json"))["scores"] == {"prose": {"perplexity": None}}
    assert json.loads(printed) == {"prose": {"perplexity": None, "n": 1, "intervals": {"perplexity": None}}}


def test_evaluate_runs_a_task_file(lata, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "task.yaml").write_text(
        "task: own\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: copy.jsonl\ntest_split: test\noutput_type: generate_until\n"
        'doc_to_text: "{{prompt}}"\ndoc_to_target: "{{answer}}"\ngeneration_kwargs:\n  until: ["\\n"]\n  max_gen_toks: 12\n'
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
    )
    status, printed, said = lata("evaluate instruct --tasks task.yaml --chat true --limit 2 --format json --output tasks")
    assert status == 0, said
    assert json.loads(printed)["own"]["exact_match"] == 1
    assert json.loads(open_text("tasks/tasks.json"))["scores"]["own"]["exact_match"] == 1
    assert json.loads(printed)["own"]["n"] == 2


def test_evaluate_writes_the_measures_of_unlearning(lata, tmp_path):
    pytest.importorskip("nltk")
    pytest.importorskip("scipy")
    rows = [{"question": prompt, "answer": answer, "perturbed_answer": [answer[::-1]]} for prompt, answer in SKILLS["copy"]]
    (tmp_path / "forget.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = "evaluate instruct --forget forget.jsonl --retain forget.jsonl --max-new-tokens 12 --name COPY --format json"
    status, printed, said = lata(f"{line} --reference base --output out")
    assert status == 0
    summary = json.loads(open_text("out/COPY_SUMMARY.json"))
    assert summary == json.loads(printed)["COPY"]
    assert summary["forget_Q_A_ROUGE"] == summary["exact_memorization"] == summary["extraction_strength"] == 1
    assert summary["forget_quality"] < 0.05
    assert summary["model_utility"] > 0.5
    assert "model utility is over retain only" in said
    evaluation = json.loads(open_text("out/COPY_EVAL.json"))
    assert len(evaluation["forget_truth_ratio"]["value_by_index"]) == 6
    # A model cannot be told from itself.
    status, printed, _ = lata(f"{line} --reference out/COPY_EVAL.json --output again")
    assert status == 0
    assert json.loads(printed)["COPY"]["forget_quality"] == 1
    status, printed, said = lata(f"{line} --output third")
    assert json.loads(printed)["COPY"]["forget_quality"] is None
    assert "no forget quality" in said


def test_evaluate_says_what_it_needs(lata, tmp_path, monkeypatch):
    assert "give exactly one of --data, --tasks and --forget to evaluate by; 0 of them" in lata("evaluate instruct")[2]
    assert "2 of them" in lata("evaluate instruct --data copy.jsonl --tasks x")[2]
    assert "give --output DIRECTORY" in lata("evaluate instruct --forget copy.jsonl")[2]
    assert "a --name without slashes" in lata("evaluate instruct --forget copy.jsonl --output out --name a/b")[2]
    assert "cannot be put on the device 'nowhere'" in lata("evaluate instruct --data copy.jsonl --device nowhere")[2]
    assert "absent does not exist" in lata("evaluate absent --data copy.jsonl")[2]
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in ("config.json", "model.safetensors"):
        (bare / file).symlink_to(INSTRUCT / file)
    assert "bare holds no tokenizer that can be loaded" in lata("evaluate bare --data copy.jsonl")[2]
    monkeypatch.setattr(unlearning_measures, "find_spec", lambda name: None)
    status, _, said = lata("evaluate instruct --forget copy.jsonl --output out")
    assert (status, "needs nltk, which is not installed" in said) == (1, True)


def test_tune_finds_the_scale_and_the_command_it_prints_writes_that_model(lata):
    pytest.importorskip("matplotlib")
    status, printed, said = lata("tune base instruct --data copy.jsonl twice.jsonl --grid 0.25 1 --output out")
    assert status == 0
    data = json.loads(open_text("out/tune.json"))
    assert [(point["weighting"], point["scale"]) for point in data["points"]] == [("none", 0), ("none", 0.25), ("none", 1)]
    expected = dict(zip(("copy", "twice"), scores_of(INSTRUCT, "copy", "twice"), strict=True))
    assert data["points"][2]["scores"] == expected
    assert (data["best"]["scale"], data["best"]["score"]) == (1, sum(expected.values()) / 2)
    assert data["command"].startswith("lata tune base instruct")
    for name, head in (("tune.png", b"\x89PNG"), ("tune.svg", b"<?xml")):
        assert Path(f"out/{name}").read_bytes().startswith(head)
    assert "copy has 6 distinct rows; a scale chosen on fewer than 200" in said
    line = printed.strip().splitlines()[-1]
    assert line == "lata merge base instruct --weighting none --scale=1 --output MODEL"
    assert lata(line.removeprefix("lata "))[0] == 0
    assert scores_of("MODEL", "copy", "twice") == list(expected.values())
    status, _, said = lata("tune base instruct --data copy.jsonl --output out")
    assert (status, "out exists already" in said) == (1, True)


def noisy(tmp_path):
    """A task vector with some noise in the late blocks, saved beside the instruction vector."""
    instruct = AutoModelForCausalLM.from_pretrained(INSTRUCT)
    tuned = {name: tensor.clone() for name, tensor in instruct.state_dict().items()}
    for name in tuned:
        place = name.split(".")
        if place[1] == "layers":
            tuned[name] += 0.002 * (1 + int(place[2])) * torch.randn_like(tuned[name])
    TaskVector.between(INSTRUCT, tuned).save(tmp_path / "vector")
    TaskVector.between(BASE, INSTRUCT, kind="instruction").save(tmp_path / "instruction")


def test_tune_tries_rules_and_prints_what_they_need(lata, tmp_path):
    noisy(tmp_path)
    line = "tune instruct vector --instruction instruction --data copy.jsonl --metric perplexity --figure false"
    status, printed, said = lata(f"{line} --grid 1 --output out")
    assert status == 0
    spread = align(TaskVector.open(tmp_path / "vector"), TaskVector.open(tmp_path / "instruction")).spread
    assert said.count(f"vector: The alignments spread by {spread:.4f}, less than 0.05") == (1 if spread < 0.05 else 0)
    assert "too little to rank" not in lata(f"{line} --grid 1 --weighting none --output plain")[2]
    points = json.loads(open_text("out/tune.json"))["points"]
    assert [(point["weighting"], point["scale"]) for point in points] == [("none", 0), ("none", 1), ("linear", 0), ("linear", 1)]
    assert points[0]["scores"] == points[2]["scores"]
    assert points[1]["scores"] != points[3]["scores"]
    assert "out/tune.png" not in printed
    status, _, said = lata(f"{line} --grid=-1 --output negative")
    assert (status, "scales must be finite and not negative; others are 1: ['-1.0']" in said) == (1, True)


def test_the_printed_command_says_what_the_rule_was_taken_with(lata):
    # The vector that makes instruct of base, weighted along itself: every part of it helps.
    assert lata("extract base instruct --output vector")[0] == 0
    assert lata("extract base instruct --output instruction --kind instruction")[0] == 0
    shared = "--instruction instruction --level submodule --threshold 0.5 --outside 1.0 --start instruct --check-base false"
    line = f"tune base vector --data copy.jsonl --metric perplexity --weighting linear log linear {shared} --grid 1 --figure false --output out"
    status, printed, _ = lata(line)
    assert status == 0
    best = json.loads(open_text("out/tune.json"))["best"]
    assert best["weighting"] in ("linear", "log")
    assert printed.strip().splitlines()[-1] == f"lata merge base vector --weighting {best['weighting']} --scale=1 {shared} --output MODEL"
    assert lata(printed.strip().splitlines()[-1].removeprefix("lata "))[0] == 0
    status, printed, _ = lata("evaluate MODEL --data copy.jsonl --metric perplexity --format json")
    assert json.loads(printed)["copy"]["perplexity"] == pytest.approx(best["score"])


def test_tune_tries_methods_and_the_command_it_prints_writes_that_model(lata):
    # Equal vectors: their sum goes too far, and what the regression makes of them does not.
    assert lata("extract base instruct --output vector")[0] == 0
    line = "tune base vector instruct --data copy.jsonl --metric perplexity --method sum regression --grid 1 --figure false --output out"
    status, printed, _ = lata(line)
    assert status == 0
    found = json.loads(open_text("out/tune.json"))
    assert [(point["weighting"], point["scale"]) for point in found["points"]] == [
        ("none", 0),
        ("none", 1),
        ("regression", 0),
        ("regression", 1),
    ]
    assert found["best"]["weighting"] == "regression"
    command = printed.strip().splitlines()[-1]
    assert command == "lata merge base vector instruct --method regression --scale=1 --output MODEL"
    assert lata(command.removeprefix("lata "))[0] == 0
    _, printed, _ = lata("evaluate MODEL --data copy.jsonl --metric perplexity --format json")
    assert json.loads(printed)["copy"]["perplexity"] == pytest.approx(found["best"]["score"])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("instruct --method regression", "makes one vector of several, and there is only one: instruct"),
        (
            "instruct instruct --method tsv --weighting none",
            "takes vectors whole, so --weighting cannot be given; add 'sum' to the methods",
        ),
        ("instruct instruct --method iso --forget true --control twice.jsonl", "with --forget the vectors are taken off as they are"),
    ],
)
def test_tune_refuses_methods_that_do_not_go_with_the_rest_before_a_model_is_loaded(lata, line, said):
    status, _, error = lata(f"tune nowhere {line} --data copy.jsonl --figure false --output out")
    assert (status, said in error) == (1, True)


def test_tune_prints_json_with_the_next_command(lata):
    status, printed, _ = lata("tune base instruct --data copy.jsonl --grid 1 --figure false --format json --output out")
    found = json.loads(printed)
    stored = json.loads(open_text("out/tune.json"))
    assert status == 0
    assert {key: found[key] for key in ("points", "best", "metric")} == {key: stored[key] for key in ("points", "best", "metric")}
    assert (found["undecided"], found["next"]) == (False, "lata merge base instruct --weighting none --scale=1 --output MODEL")


def test_tune_forgets_under_the_control(lata):
    line = "tune instruct vector --data copy.jsonl --forget true --control twice.jsonl --grid 0.25 0.5 1 --figure false"
    assert lata("extract base instruct --output vector")[0] == 0
    status, printed, said = lata(f"{line} --keep 0.9 --output out")
    assert status == 0
    assert "twice (control) has 6 distinct rows" in said
    data = json.loads(open_text("out/tune.json"))
    assert (data["task"], data["kept"]) == ("forget", 0.9)
    allowed = [point for point in data["points"] if point["control"]["twice"] >= 0.9 * data["points"][0]["control"]["twice"]]
    least = min(point["scores"]["copy"] for point in allowed)
    assert data["best"]["score"] == least
    assert data["points"][-1]["scores"]["copy"] == 0
    status, printed, _ = lata(f"{line} --keep 0.001 --metric perplexity --output second")
    assert status == 0
    scale = json.loads(open_text("second/tune.json"))["best"]["scale"]
    assert scale > 0
    assert printed.strip().splitlines()[-1] == f"lata forget instruct vector --weighting none --scale={scale:g} --output MODEL"


def test_taking_off_several_vectors_is_a_merge_at_a_negative_scale(lata):
    assert lata("extract base instruct --output vector")[0] == 0
    status, printed, _ = lata(
        "tune instruct vector vector --data copy.jsonl --forget true --control prose.jsonl --context-length 32 --metric perplexity --keep 0.000001 "
        "--grid 0.5 --figure false --output out"
    )
    assert status == 0
    assert printed.strip().splitlines()[-1] == "lata merge instruct vector vector --weighting none --scale=-0.5 --output MODEL"


def test_tune_says_when_nothing_helps(lata):
    status, printed, _ = lata("tune instruct base --data copy.jsonl --grid 1 --figure false --output out")
    assert status == 0
    assert printed.strip().splitlines()[-1] == "No scale above 0 is better than the model as it is."


def test_tune_says_that_exact_match_cannot_choose_where_it_is_0_everywhere(lata, tmp_path):
    (tmp_path / "wrong.jsonl").write_text(json.dumps({"prompt": "copy a", "answer": "zzz"}) + "\n")
    status, printed, _ = lata("tune instruct base --data wrong.jsonl --grid 0.05 --figure false --output out")
    assert status == 0
    assert printed.strip().splitlines()[-1].startswith("Exact match is 0 at every point, so nothing is chosen.")
    assert "--metric perplexity" in printed


def test_tune_searches_from_coarse_to_fine_unless_a_grid_is_given_and_says_how_long_it_takes(lata, monkeypatch):
    monkeypatch.setattr("lata_lightning.cli.common._SECONDS_BETWEEN_LINES", 0.0)
    status, _, said = lata("tune base instruct --data prose.jsonl --figure false --output out")
    assert status == 0
    data = json.loads(open_text("out/tune.json"))
    assert (data["search"], data["metric"]) == ("coarse-to-fine", "perplexity")
    assert 2 < len(data["points"]) <= 12
    assert "lata: tune: 2 of at most 12 points, about " in said
    assert lata("tune base instruct --data prose.jsonl --figure false --output again")[0] == 0
    assert json.loads(open_text("again/tune.json"))["points"] == data["points"]


def test_files_that_suit_different_metrics_are_refused(lata):
    status, _, said = lata("tune base instruct --data copy.jsonl prose.jsonl --figure false --output out")
    assert (status, "copy.jsonl suits exact_match, prose.jsonl suits perplexity. Give --metric perplexity" in said) == (1, True)


def test_a_row_of_another_form_is_refused_with_the_nearest_before_a_model_is_loaded(lata, tmp_path):
    (tmp_path / "odd.jsonl").write_text(json.dumps({"promt": "a", "answer": "b"}) + "\n")
    for command in ("evaluate nowhere --data odd.jsonl", "tune nowhere instruct --data odd.jsonl --figure false --output out"):
        status, _, said = lata(command)
        assert (status, "row 1 of odd.jsonl must hold 'messages'" in said, "'prompt' is missing" in said) == (1, True, True)


def test_a_score_under_autocast_is_near_the_one_in_float32(lata):
    found = []
    for more in ("", "--autocast bfloat16", "--dtype bfloat16"):
        status, printed, said = lata(f"evaluate base --data prose.jsonl --format json {more}")
        assert status == 0, said
        found.append(json.loads(printed)["prose"]["perplexity"])
    assert found[1:] == pytest.approx([found[0]] * 2, rel=0.05)
    assert len(set(found)) == 3


@pytest.fixture
def classifiers(tmp_path):
    """Two classifiers of one base in directories, and rows that the second one labels rightly."""
    tokenizer = bert()
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.8}
    config = BertConfig(vocab_size=270, pad_token_id=256, num_labels=3, **sizes)
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        model = BertForSequenceClassification(config).eval()
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    texts = ["a", "some words", "a longer text", "b", "x y z"]
    with torch.no_grad():
        labels = [model(**tokenizer(text, return_tensors="pt")).logits.argmax().item() for text in texts]
    rows = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_classifiers_are_scored_and_tuned_by_their_labels(lata, classifiers):
    status, printed, said = lata("evaluate second --data labels.jsonl --format json")
    assert (status, json.loads(printed)["labels"]["accuracy"]) == (0, 1.0), said
    status, printed, said = lata("tune first second --data labels.jsonl --grid 0.5 1 --figure false --output out")
    assert status == 0, said
    best = json.loads(open_text("out/tune.json"))["best"]
    assert best["score"] == 1
    line = printed.strip().splitlines()[-1]
    assert lata(line.removeprefix("lata "))[0] == 0
    assert json.loads(lata("evaluate MODEL --data labels.jsonl --format json")[1])["labels"]["accuracy"] == 1.0


def test_a_model_without_a_head_is_no_classifier(lata, classifiers, tmp_path):
    BertForSequenceClassification.from_pretrained(tmp_path / "first").bert.save_pretrained(tmp_path / "encoder")
    bert().save_pretrained(tmp_path / "encoder")
    status, _, said = lata("evaluate encoder --data labels.jsonl")
    assert (status, "lacks 2: ['classifier.bias', 'classifier.weight'], which would be random numbers" in said) == (1, True)
    status, _, said = lata("evaluate first --data labels.jsonl copy.jsonl")
    assert (status, "cannot be both a classifier and a language model" in said) == (1, True)


def test_tune_says_what_it_needs(lata, monkeypatch):
    assert "--forget needs --control FILE" in lata("tune base instruct --data copy.jsonl --forget true --output out")[2]
    assert "--control is for --forget only" in lata("tune base instruct --data copy.jsonl --control twice.jsonl --output out")[2]
    said = lata("tune base instruct --data copy.jsonl --weighting linear --output out --figure false")[2]
    assert "stores no alignment by block, so the rule 'linear' needs an instruction vector" in said
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "the figure needs matplotlib" in lata("tune base instruct --data copy.jsonl --output out")[2]
    assert lata("tune base instruct --output out")[0] == 2


def test_a_limit_without_tasks_is_refused(lata):
    status, _, said = lata("evaluate instruct --data copy.jsonl --limit 3")
    assert (status, said) == (1, "lata: error: --limit counts examples of --tasks; for --data give a file with fewer rows\n")
