import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from lata_lightning import regress
from lata_lightning.cli.main import main
from lata_lightning.quickstart.make_checkpoints import make_tokenizer
from lata_lightning.rows.inputs import model_inputs, tokenised
from lata_lightning.rows.reading import read_rows
from lata_lightning.rows.schema import read_samples
from lata_lightning.vectors.task_vector import TaskVector

WORDS = {"math": "compute 1+2", "string": "reverse abc"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """instruct, math, string, a model from elsewhere, one without tokenizer, and samples."""
    directory = tmp_path_factory.mktemp("linearity")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in ("instruct", "math", "string"):
        model.load_state_dict({key: tensor + (name != "instruct") * 0.03 * torch.randn_like(tensor) for key, tensor in start.items()})
        model.save_pretrained(directory / name)
    tokenizer.save_pretrained(directory / "instruct")
    model.save_pretrained(directory / "bare")
    model.save_pretrained(directory / "short")
    tokenizer.save_pretrained(directory / "moe")
    tokenizer.model_max_length = 3
    tokenizer.save_pretrained(directory / "short")
    T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=20)).save_pretrained(
        directory / "t5"
    )
    broken = dict(start)
    broken["model.layers.0.mlp.up_proj.weight"] = torch.full((24, 16), torch.nan)
    model.load_state_dict(broken)
    model.save_pretrained(directory / "broken")
    experts = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=2, num_experts_per_tok=1))
    for name in ("moe", "moe-tuned"):
        experts.save_pretrained(directory / name)
        with torch.no_grad():
            for parameter in experts.parameters():
                parameter.add_(0.03 * torch.randn_like(parameter))
    for name, words in WORDS.items():
        rows = [{"prompt": f"{words}{number}", "answer": "x" * (number % 3 + 1)} for number in range(6)]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.fixture
def lata(folder, monkeypatch, tmp_path, capsys):
    """Runs a command in a fresh directory that sees the models; gives exit status, standard output and standard error."""
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)

    def run(line):
        try:
            status = main(line.split())
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


SOLVE = "solve instruct math string --data math.jsonl string.jsonl --samples 5"


def read(path):
    return json.loads(Path(path).read_text())


def state(path):
    return {name: tensor.detach().double() for name, tensor in AutoModelForCausalLM.from_pretrained(path).named_parameters()}


@pytest.mark.parametrize("level", ["block", "submodule"])
def test_solved_coefficients_are_what_a_merge_uses(lata, level):
    status, printed, said = lata(f"{SOLVE} --level {level} --outside 0.5 --output coefficients.json --format json")
    assert status == 0
    document = json.loads(printed)
    assert "lata merge instruct math string --coefficients coefficients.json" in said
    assert lata("merge instruct math string --coefficients coefficients.json --scale 1 0.8 --output merged")[0] == 0
    merged, start, *tuned = (state(path) for path in ("merged", "instruct", "math", "string"))
    coefficients = [vector["coefficients"] for vector in document["vectors"]]
    assert (
        set(coefficients[0])
        == {
            "block": {"model.layers.0", "model.layers.1"},
            "submodule": {f"model.layers.{index}.{part}" for index in (0, 1) for part in ("attention", "mlp", "norm")},
        }[level]
    )
    kinds = {"self_attn": "attention", "mlp": "mlp", "input_layernorm": "norm", "post_attention_layernorm": "norm"}
    for name, tensor in merged.items():
        expected = start[name]
        for model, found, scale in zip(tuned, coefficients, (1.0, 0.8), strict=True):
            path = name.split(".")
            layer = ".".join(path[:3]) + (f".{kinds[path[3]]}" if level == "submodule" else "") if path[1] == "layers" else None
            expected = expected + scale * (0.5 if layer is None else found[layer]) * (model[name] - start[name]).float().double()
        assert torch.equal(tensor, expected.float().double()), name
    record = read("merged/merge.json")
    assert [(term["weighting"], term["level"], term["outside"]) for term in record["terms"]] == [("closed-form", level, 0.5)] * 2


def test_saved_vectors_and_tuned_models_give_the_same_coefficients(lata):
    lata("extract instruct math --output vector")
    lata(f"{SOLVE} --output one.json")
    assert lata(f"{SOLVE.replace('instruct math', 'instruct vector')} --output other.json")[0] == 0
    one, other = (read(path) for path in ("one.json", "other.json"))
    assert [vector["coefficients"] for vector in one["vectors"]] == [vector["coefficients"] for vector in other["vectors"]]
    assert lata("merge instruct vector string --coefficients one.json --output merged")[0] == 0


def test_forgetting_takes_coefficients_too(lata):
    lata("extract instruct math --output vector")
    lata("solve instruct vector --data math.jsonl --outside 0 --output coefficients.json")
    assert lata("forget math vector --coefficients coefficients.json --scale 0.5 --output forgotten")[0] == 0
    (term,) = read("forgotten/merge.json")["terms"]
    assert (term["scale"], term["weighting"], term["outside"]) == (-0.5, "closed-form", 0.0)
    assert term["coefficients"] == read("coefficients.json")["vectors"][0]["coefficients"]


def test_coefficients_can_be_stored_with_a_vector(lata, tmp_path):
    from lata_lightning.linearity.solution import Solution

    lata("extract instruct math --output vector")
    lata("solve instruct vector --data math.jsonl --output coefficients.json")
    (weighted,) = Solution.open("coefficients.json").apply([TaskVector.open("vector")])
    weighted.save(tmp_path / "weighted")
    assert json.loads(lata("inspect weighted --format json")[1])["weighting"] == "closed-form"
    assert lata("merge instruct weighted --output merged")[0] == 0
    lata("merge instruct vector --coefficients coefficients.json --output other")
    one, other = state("merged"), state("other")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_table_shows_every_layer_and_how_well_it_is_determined(lata):
    status, printed, said = lata(f"{SOLVE} --output coefficients.json")
    assert status == 0
    lines = [line.split() for line in printed.splitlines() if line.split()[:1] in (["0"], ["1"])]
    assert [len(line) for line in lines] == [6, 6]
    document = read("coefficients.json")
    assert [float(line[1]) for line in lines] == pytest.approx(list(document["vectors"][0]["coefficients"].values()), abs=1e-4)
    assert "math" in printed
    assert "string" in printed
    assert "fewer than" not in said


def test_linearity_prints_a_score_for_every_module_and_draws_it(lata, tmp_path):
    status, printed, said = lata("linearity instruct math string --data math.jsonl --samples 2 --figure scores.png --format json")
    assert status == 0
    assert "figure written to scores.png" in said
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")
    measured = json.loads(printed)
    assert [linearity["vector"] for linearity in measured] == ["math", "string"]
    parts = [(score["part"], score["depth"]) for score in measured[0]["scores"]]
    assert parts == [("model", None), *((part, depth) for depth in (0, 1) for part in ("block", "attention", "mlp"))]
    assert all(score["output"] > 0 for linearity in measured for score in linearity["scores"])
    table = lata("linearity instruct math --data math.jsonl --level block --distance cosine")[1]
    assert [line.split()[0] for line in table.splitlines() if "e-0" in line] == ["model", "0", "1"]


REGRESS = "regress instruct math string --data math.jsonl string.jsonl --samples 5"


@pytest.mark.parametrize("in_order", ["true", "false"])
def test_a_regressed_vector_is_that_of_the_function_and_is_merged_like_any_other(lata, in_order):
    status, printed, said = lata(f"{REGRESS} --in-order {in_order} --off-diagonal 0.8 --ridge 1e-5 --batch-size 2 --output one")
    assert status == 0
    assert printed == "one: one vector of 2, 21 tensors, 16 of them fitted\n"
    assert "lata merge instruct one --output MERGED" in said
    assert "plain means" not in said
    tokenizer = AutoTokenizer.from_pretrained("instruct")
    samples = [model_inputs(tokenised(read_samples(read_rows(f"{name}.jsonl", 5), name), tokenizer, max_tokens=64)[0], 2) for name in WORDS]
    vectors = [TaskVector.between("instruct", name) for name in WORDS]
    expected = regress(vectors, "instruct", samples, in_order=in_order == "true", off_diagonal=0.8, ridge=1e-5)
    found = TaskVector.open("one")
    assert list(found) == list(expected)
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6)
    inputs = found.manifest.derivation.inputs
    assert [entry.facts for entry in inputs] == [{"samples": 5, "data": f"{name}.jsonl"} for name in ("math", "string")]
    facts = json.loads(lata("inspect one --format json")[1])
    assert facts["made of"] == "math − instruct, string − instruct"
    assert lata("verify one")[0] == 0
    assert lata("merge instruct one --scale 0.5 --output merged")[0] == 0
    merged, start = state("merged"), state("instruct")
    for name, tensor in merged.items():
        assert torch.equal(tensor, (start[name] + 0.5 * found[name].double()).float().double()), name


def test_a_regressed_vector_can_be_stored_in_half_the_room_and_says_what_is_a_plain_mean(lata):
    status, _, said = lata("regress moe moe-tuned --data math.jsonl --samples 2 --dtype bfloat16 --output one")
    assert status == 0
    assert "so plain means, are 12: ['model.layers.0.block_sparse_moe.experts.0" in said
    assert TaskVector.open("one").manifest.precision_loss is not None


def test_without_data_the_vectors_alone_are_solved_and_their_interference_is_shown(lata):
    status, printed, said = lata("regress instruct math string --output one")
    assert status == 0
    first, *table = printed.splitlines()
    assert first == "one: one vector of 2, 21 tensors, 16 of them fitted"
    assert [line.split()[0] for line in table if line.strip()][-3:] == ["0", "1", "outside"]
    assert any(line.split()[:1] == ["layer"] and "condition" in line for line in table if line.strip())
    assert "lata merge instruct one --output MERGED" in said
    expected = regress([TaskVector.between("instruct", name) for name in WORDS])
    found = TaskVector.open("one")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    facts = json.loads(lata("inspect one --format json")[1])
    assert facts["derivation"] == "regression without samples"
    assert facts["interference, math − instruct"].startswith("0.")
    assert "| layer | interference, math − instruct | interference, string − instruct | condition |" in Path("one/README.md").read_text()


def test_interference_is_given_by_matrix_as_json(lata):
    lata("extract instruct math --output math-vector")
    status, printed, _ = lata("regress instruct math-vector string --output one --format json --ridge 0.5 --prior mean --workers 2")
    assert status == 0
    found = json.loads(printed)
    assert found["derivation"]["settings"] == {"ridge": 0.5, "prior": "mean"}
    assert len(found["matrices"]) == found["fitted"] == 16
    assert all(len(entry["interference"]) == 2 and entry["condition"] > 1 for entry in found["matrices"].values())
    assert [entry["vector"] for entry in found["derivation"]["measured"]] == ["math-vector", "string − instruct", None]


def test_what_is_cut_or_lacking_is_said(lata):
    said = lata("linearity instruct math --data math.jsonl --level block --max-tokens 4")[2]
    assert "math.jsonl: 6 of 6 rows were cut to 4 tokens" in said
    assert "math.jsonl holds 6 rows, fewer than the 30 asked for" in said
    assert "math.jsonl: 2 of 2 rows were cut to 3 tokens" in lata("linearity short math --data math.jsonl --level block --samples 2")[2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("solve instruct math string --data math.jsonl --output x", "got 1 files for 2 vectors"),
        ("linearity instruct math --data math.jsonl string.jsonl", "got 2 files for 1 vectors"),
        (f"{SOLVE} --output math", "math exists already"),
        (f"{SOLVE} --ridge -1 --output x", "the ridge must not be negative"),
        (f"{SOLVE} --batch-size 0 --output x", "a batch needs at least one row, not 0"),
        ("regress instruct math string --data math.jsonl --output x", "got 1 files for 2 vectors"),
        (f"{REGRESS} --output math", "math exists already"),
        (f"{REGRESS} --ridge 0 --output x", "the ridge must be positive"),
        (f"{REGRESS} --off-diagonal 2 --output x", "must lie in [0, 1]"),
        ("regress instruct math string --samples 5 --in-order false --output x", "--samples, --in-order can only be given with --data"),
        (f"{REGRESS} --device cpu:0 --vocabulary onto --output x", "--device, --vocabulary can only be given without --data"),
        ("regress instruct math string --device abacus --output x", "cannot be solved on 'abacus' here"),
        ("regress t5 moe moe-tuned --output x", "must hold the same tensors"),
        ("regress instruct math moe --output x", "must hold the same tensors"),
        ("regress instruct t5 --data math.jsonl --output x", "must hold the same tensors"),
        (
            "regress instruct broken --data math.jsonl --output x",
            "holds NaN or infinite values in 1: ['model.layers.0.mlp.up_proj.weight']",
        ),
        ("solve bare math --data math.jsonl --output x", "bare holds no tokenizer that can be loaded"),
        ("solve t5 t5 --data math.jsonl --output x", "t5 has an encoder and a decoder"),
        ("solve instruct t5 --data math.jsonl --output x", "must hold the same tensors"),
        ("solve instruct nowhere --data math.jsonl --output x", "nowhere does not exist"),
        ("solve nowhere math --data math.jsonl --output x", "nowhere does not exist"),
        ("solve instruct math --data nowhere --output x", "nowhere is neither a file nor a data set"),
        ("linearity instruct math --data math.jsonl --figure math", "math exists already"),
        ("linearity instruct math --data math.jsonl --figure x.txt", "must end in the suffix of a picture"),
        ("merge instruct math --coefficients two.json --output x", "are for 2 vectors, got 1"),
        ("merge instruct string math --coefficients two.json --output x", "Give the vectors in the order"),
        ("merge instruct math string --coefficients two.json --weighting none --output x", "not both"),
        ("merge instruct math string --coefficients two.json --instruction math --output x", "not both"),
        ("merge instruct math string --coefficients two.json --start base --output x", "started from base"),
        ("merge instruct math string --coefficients nowhere --output x", "nowhere cannot be read"),
        ("merge instruct math string --coefficients math.jsonl --output x", "math.jsonl is no file of coefficients"),
    ],
)
def test_bad_input_gives_one_line_and_status_1(lata, tmp_path, line, message):
    lata(f"{SOLVE} --output two.json")
    before = {path.name for path in tmp_path.iterdir()}
    status, printed, said = lata(line)
    assert status == 1
    assert printed == ""
    error = said.splitlines()[-1]
    assert error.startswith("lata: error: ")
    assert message in error
    assert {path.name for path in tmp_path.iterdir()} == before


def test_the_order_of_vectors_can_be_left_unchecked(lata):
    lata(f"{SOLVE} --output two.json")
    assert lata("merge instruct string math --coefficients two.json --check-base false --output merged")[0] == 0


@pytest.mark.parametrize(
    "line", ["solve instruct math", "linearity instruct math", "regress instruct math", f"{SOLVE} --output x --level tensor", "linearity"]
)
def test_wrong_usage_gives_status_2(lata, line):
    assert lata(line)[0] == 2
