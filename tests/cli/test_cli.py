import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lata_lightning
from lata_lightning.alignment import Alignment, LayerStats
from lata_lightning.cli.main import main
from lata_lightning.layers import LEVELS
from lata_lightning.moments import STARTS
from lata_lightning.vectors.task_vector import TaskVector
from lata_lightning.weighting import WEIGHTINGS

CONFIG = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """base → instruct → math and string; stranger is made from base."""
    directory = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    states = {"base": {name: tensor.clone() for name, tensor in model.state_dict().items()}}
    for name, origin, size in (
        ("instruct", "base", 0.02),
        ("math", "instruct", 0.01),
        ("string", "instruct", 0.01),
        ("stranger", "base", 0.03),
    ):
        # Deeper blocks move more, so that the alignments differ clearly.
        states[name] = {
            key: tensor + size * (1 + int(key.split(".")[2]) if ".layers." in key else 1) * torch.randn_like(tensor)
            for key, tensor in states[origin].items()
        }
    for name, state in states.items():
        model.load_state_dict(state)
        model.save_pretrained(directory / name)
    (directory / "instruct" / "tokenizer.json").write_text("{}")
    return directory


@pytest.fixture
def lata(models, monkeypatch, tmp_path, capsys):
    """Runs a command in a fresh directory that sees the models; gives exit status, standard output and standard error."""
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)

    def run(line):
        try:
            status = main(line.split())
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


def state(path):
    return {name: tensor.detach().double() for name, tensor in AutoModelForCausalLM.from_pretrained(path).named_parameters()}


def test_extract_align_merge_give_the_numbers_of_a_direct_float64_computation(lata):
    assert lata("extract base instruct --output instruction --kind instruction")[0] == 0
    assert lata("extract instruct math --output vector")[0] == 0
    status, printed, _ = lata("align vector --instruction instruction --format json")
    assert status == 0
    found = json.loads(printed)
    base, instruct, math = (state(name) for name in ("base", "instruct", "math"))
    direct = {}
    for index in range(4):
        names = [name for name in base if name.startswith(f"model.layers.{index}.")]
        comp = torch.cat([(math[name] - base[name]).flatten() for name in names])
        instr = torch.cat([(instruct[name] - base[name]).flatten() for name in names])
        direct[f"model.layers.{index}"] = (comp @ instr / comp.norm() / instr.norm()).item()
    assert {name: stats["alignment"] for name, stats in found["layers"].items()} == pytest.approx(direct, abs=1e-6)
    falling = sorted(direct, key=lambda name: -direct[name])
    coefficients = {name: (falling.index(name) + 1) / 4 for name in direct}
    assert {name: stats["coefficient"] for name, stats in found["layers"].items()} == coefficients
    assert set(found["outside"]) == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert lata("merge instruct vector --instruction instruction --scale 0.6 --output merged")[1] == "merged\n"
    merged = state("merged")
    for name, tensor in merged.items():
        coefficient = coefficients.get(".".join(name.split(".")[:3]), 0.0)
        delta = (math[name] - instruct[name]).float().double()
        expected = (instruct[name] + 0.6 * coefficient * delta).float().double()
        assert torch.equal(tensor, expected), name


def test_a_tuned_model_serves_as_vector_and_gives_the_same_merge(lata):
    lata("extract base instruct --output instruction")
    lata("extract instruct math --output vector")
    lata("merge instruct vector string --instruction instruction --scale 0.5 0.7 --output saved")
    lata("extract instruct string --output other")
    lata("merge instruct vector other --instruction instruction --scale 0.5 0.7 --output both")
    one, other = state("saved"), state("both")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_number_of_workers_changes_no_byte(lata, tmp_path):
    for workers in ("1", "3"):
        assert lata(f"extract instruct math --output vector-{workers} --workers {workers}")[0] == 0
        assert lata(f"merge instruct vector-{workers} string --scale 0.3 --output merged-{workers} --workers {workers}")[0] == 0
    for file in ("vector-{}/delta.safetensors", "merged-{}/model.safetensors"):
        assert (tmp_path / file.format(1)).read_bytes() == (tmp_path / file.format(3)).read_bytes()


def test_merged_output_is_complete_and_says_how_it_was_made(lata, tmp_path):
    lata("extract instruct math --output vector")
    lata("merge instruct vector --output merged --dtype bfloat16")
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {
        "README.md", "config.json", "generation_config.json", "merge.json", "model.safetensors", "tokenizer.json",
    }  # fmt: skip
    card = (tmp_path / "merged/README.md").read_text()
    assert "lata merge instruct vector --output merged --dtype bfloat16" in card
    assert 'base_model:\n- "instruct"' in card
    assert AutoModelForCausalLM.from_pretrained("merged").dtype == torch.bfloat16
    assert lata("verify merged")[0] == 0


def test_forgetting_what_was_merged_gives_the_start_back_to_rounding(lata):
    lata("extract instruct math --output vector")
    lata("merge instruct vector --output merged")
    lata("forget merged vector --output forgotten")
    forgotten, instruct = state("forgotten"), state("instruct")
    assert max((forgotten[name] - instruct[name]).abs().max() for name in instruct) < 1e-7


def test_a_vector_from_base_is_merged_without_the_instruction_vector_in_it(lata):
    lata("extract base instruct --output instruction")
    lata("extract base stranger --start base --output vector")
    assert lata("merge instruct vector --instruction instruction --weighting none --output merged")[0] == 0
    merged, stranger = state("merged"), state("stranger")
    # instruct + (stranger − base − (instruct − base)) is the stranger itself.
    assert max((merged[name] - stranger[name]).abs().max() for name in merged) < 1e-6


def test_a_projected_vector_is_what_lies_across_and_is_forgotten_like_any_other(lata):
    lata("extract base instruct --output instruction --kind instruction")
    lata("extract base stranger --start base --output vector")
    status, printed, _ = lata("project vector --instruction instruction --level block --output across")
    assert status == 0
    assert re.fullmatch(r"across: \d+ tensors; -?[\d.]+ to -?[\d.]+ times instruction was taken off a layer\n", printed)
    assert json.loads(lata("inspect across --format json")[1])["derivation settings"] == {"level": "block"}
    assert lata("verify across")[0] == 0
    assert lata("forget stranger across --output forgotten")[0] == 0
    states = {name: state(name) for name in ("base", "instruct", "stranger", "forgotten")}
    for block in (f"model.layers.{number}." for number in range(4)):
        flat = {
            name: torch.cat([tensor.ravel() for key, tensor in found.items() if key.startswith(block)]) for name, found in states.items()
        }
        taken, along, moved = flat["stranger"] - flat["forgotten"], flat["instruct"] - flat["base"], flat["stranger"] - flat["base"]
        assert abs(float(taken @ along)) < 1e-5 * float(taken.norm() * along.norm())
        # What was taken off is the whole vector but for a multiple of the instruction vector.
        share = float(moved @ along / (along @ along))
        assert torch.allclose(moved - taken, share * along, rtol=0, atol=1e-6)
    assert "already" in lata("project vector --instruction instruction --output across")[2]


def weighted(tmp_path, rule, *, spread):
    """Save instruct − math under a rule, with alignments that spread this far; its path is ``weighted``."""
    vector = TaskVector.between("instruct", "math")
    stats = {layer: LayerStats(0.9 - spread * number / 3, 1.0, 1.0, 1.0) for number, layer in enumerate(vector.layers.blocks)}
    vector.weighted(Alignment("block", "instruct", stats, {}), rule).save(tmp_path / "weighted")


@pytest.mark.parametrize(
    "command", ["merge instruct weighted", "forget math weighted", "export weighted --to hf", "export weighted --to pure"]
)
def test_flat_coefficients_are_applied_only_if_they_are_asked_for(lata, tmp_path, command):
    weighted(tmp_path, "log", spread=0.03)
    before = sorted(path.name for path in tmp_path.iterdir())
    status, printed, said = lata(f"{command} --output out")
    assert (status, printed, said.count("\n")) == (1, "", 1)
    assert "spread by 0.0300, less than 0.05" in said
    assert "--weighting none" in said
    assert "--weighting log" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    for rule, line in {
        "none": "coefficient 1 for every tensor",
        "log": "by the rule 'log': 0 to 1 for 4 layers",
        "stored": "rule 'log'",
    }.items():
        status, printed, said = lata(f"{command} --weighting {rule} --output {rule}")
        assert (status, printed) == (0, f"{rule}\n")
        if rule == "none" and not command.endswith("pure"):
            assert said == "lata: weighted: coefficient 1 for every tensor\n"
        elif rule != "none":
            assert said.splitlines()[0].startswith("lata: weighted: coefficients")
            assert line in said
            assert "0 for the tensors outside of them, 3: ['lm_head.weight'" in said
            assert said.count("too little to rank the layers by") == 1


def test_each_vector_of_a_merge_says_what_it_is_applied_with(lata, tmp_path):
    weighted(tmp_path, "linear", spread=0.3)
    lata("extract instruct string --output string-vector")
    status, _, said = lata("merge instruct weighted string-vector math --output merged")
    assert status == 0
    first, second, third, _ = said.splitlines()
    assert first.startswith(
        "lata: weighted: coefficients by the rule 'linear': 0.25 to 1 for 4 layers (by block), 0 for the tensors outside"
    )
    assert second == "lata: string-vector: coefficient 1 for every tensor"
    assert third.endswith(": coefficient 1 for every tensor")
    terms = json.loads((tmp_path / "merged/merge.json").read_text())["terms"]
    assert [(term["weighting"], term["outside"]) for term in terms] == [("linear", 0.0), ("none", 1.0), ("none", 1.0)]


def test_a_merge_with_an_instruction_vector_says_that_its_ranks_are_noise(lata):
    lata("extract base instruct --output instruction")
    _, _, said = lata("merge instruct math --instruction instruction --output merged")
    assert said.count("coefficients by the rule 'linear': 0.25 to 1 for 4 layers") == 1
    assert said.count("too little to rank the layers by") == 1


@pytest.mark.parametrize("option", ["--outside 1", "--level block", "--threshold 0.5"])
def test_an_option_that_would_have_no_effect_is_refused(lata, tmp_path, option):
    weighted(tmp_path, "linear", spread=0.3)
    for rule in ("", "--weighting stored", "--weighting none"):
        status, _, said = lata(f"merge instruct weighted {rule} {option} --output out")
        assert status == 1
        assert f"{option.split()[0]} has no effect where" in said
    assert lata(f"merge instruct weighted --weighting linear {option} --output out")[0] == 0


@pytest.mark.parametrize("form", ["table", "json"])
def test_align_says_once_what_a_ranking_is_worth(lata, form):
    lata("extract base instruct --output instruction --kind instruction")
    lata("extract instruct math --output vector")
    _, printed, said = lata(f"align vector --instruction instruction --format {form}")
    assert (printed + said).count("too little to rank the layers by") == 1
    assert "rank" not in lata("align vector --instruction instruction --weighting none")[2]
    if form == "json":
        found = json.loads(printed)
        layers = found["layers"].values()
        expected = spearmanr([stats["alignment"] for stats in layers], [-stats["relative_norm"] for stats in layers]).statistic
        assert found["alignment_norm_correlation"] == pytest.approx(expected)
        assert found["alignment_ranks_by_relative_norm"] == (abs(expected) >= 0.9)
        assert found["alignment_too_flat_to_rank"] is True


def test_inspect_tells_a_ranking_by_relative_norm(lata, tmp_path):
    vector = TaskVector.between("instruct", "math")
    stats = {layer: LayerStats(1 / (1 + number), 0.1 * number, 1.0, 1.0) for number, layer in enumerate(vector.layers.blocks)}
    vector.weighted(Alignment("block", "instruct", stats, {}), "linear").save(tmp_path / "weighted")
    facts = json.loads(lata("inspect weighted --format json")[1])
    assert (facts["rank correlation with −relative norm"], facts["ranks by relative norm"]) == (1.0, True)
    assert "The ranking is one by relative norm" in (tmp_path / "weighted/README.md").read_text()


def test_stored_coefficients_are_used_unless_another_rule_is_asked_for(lata, tmp_path):
    weighted(tmp_path, "log", spread=0.3)
    for name, options in {"stored": "", "log": "--weighting log", "plain": "--weighting none"}.items():
        assert lata(f"merge instruct weighted {options} --output {name}")[0] == 0
    stored, log, plain, start = (state(name) for name in ("stored", "log", "plain", "instruct"))
    assert all(torch.equal(stored[name], log[name]) for name in stored)
    assert torch.equal(stored["lm_head.weight"], start["lm_head.weight"])
    assert not torch.equal(plain["lm_head.weight"], start["lm_head.weight"])
    assert lata("merge instruct weighted --weighting linear --level tensor --output x")[0] == 1


def test_an_undefined_alignment_is_null_and_has_no_coefficient(lata, tmp_path):
    changed = AutoModelForCausalLM.from_pretrained("base")
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight.add_(0.1)
    changed.save_pretrained("partial")
    lata("extract base partial --output instruction")
    lata("extract partial instruct --output vector")
    status, printed, said = lata("align vector --instruction instruction --format json")
    assert status == 0
    layers = json.loads(printed)["layers"]
    assert [stats["alignment"] is None for stats in layers.values()] == [False, True, True, True]
    assert all(stats["coefficient"] is None for stats in layers.values())
    assert "no coefficients: the alignment is undefined in 3" in said
    assert lata("merge partial vector --instruction instruction --output x")[0] == 1
    assert not (tmp_path / "x").exists()


def test_inspect_says_what_a_path_holds(lata):
    lata("extract instruct math --output vector --dtype bfloat16")
    facts = json.loads(lata("inspect vector --format json")[1])
    assert (facts["holds"], facts["tensors"], facts["blocks"], facts["dtype"]) == ("task vector", 39, 4, "bfloat16")
    assert facts["outside the blocks"]["lm_head.weight"] == "head"
    facts = json.loads(lata("inspect math --format json")[1])
    assert (facts["holds"], facts["architecture"], facts["first and last block"]) == (
        "weights", "LlamaForCausalLM", "model.layers.0 … model.layers.3",
    )  # fmt: skip
    assert "model.layers.0 … model.layers.3" in lata("inspect math")[1]


def test_a_lower_precision_says_what_it_cost(lata):
    said = lata("extract instruct math --output vector --dtype float16")[2]
    assert "float16 made" in said
    assert re.search(r"cosine to the full-precision vector (0\.99|1\.00)\d{4}$", said.strip())


def test_verify_finds_a_changed_byte(lata, tmp_path):
    lata("extract instruct math --output vector")
    assert lata("verify vector")[1] == "vector: all 39 tensors match their recorded hashes\n"
    file = tmp_path / "vector/delta.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    status, _, said = lata("verify vector")
    assert status == 1
    assert said.startswith("lata: error: vector does not match its record")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("extract instruct nowhere --output x", "nowhere does not exist"),
        ("extract instruct math --output base", "base exists already"),
        ("align vector --instruction vector", "are different weights"),
        ("align vector", "give --instruction VECTOR"),
        ("align instruct --instruction vector", "instruct is no task vector"),
        ("merge instruct vector --scale 1 2 --output x", "2 scales for 1 vectors"),
        ("merge instruct vector --weighting linear --output x", "needs --instruction VECTOR"),
        ("merge instruct vector stranger-vector --output x", "are different weights"),
        ("merge vector vector --output x", "is a task vector, and a model is needed"),
        ("verify instruct", "no hashes to compare with"),
        ("inspect nowhere", "nowhere does not exist"),
    ],
)
def test_bad_input_gives_one_line_and_status_1(lata, tmp_path, line, message):
    lata("extract instruct math --output vector")
    lata("extract base stranger --output stranger-vector")
    before = {path.name for path in tmp_path.iterdir()}
    status, printed, said = lata(line)
    assert status == 1
    assert printed == ""
    assert said.startswith("lata: error: ")
    assert message in said
    assert said.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == before


def test_the_provenance_check_can_be_switched_off(lata):
    lata("extract instruct math --output vector")
    lata("extract base stranger --output other")
    assert lata("merge instruct vector other --check-base false --output merged")[0] == 0


@pytest.mark.parametrize(
    "line",
    [
        "frobnicate",
        "merge instruct",
        "merge instruct v --weighting cubic --output x",
        "align v --level head",
        "merge a b --scale x --output c",
        "merge a b --output c --workers 0",
    ],
)
def test_wrong_usage_gives_status_2(lata, line):
    assert lata(line)[0] == 2


def test_arguments_can_come_from_a_config_file(lata, tmp_path):
    (tmp_path / "extract.yaml").write_text("start_model: instruct\ntuned_model: math\noutput: vector\ndtype: bfloat16\n")
    assert lata("extract --config extract.yaml")[0] == 0
    assert TaskVector.open(tmp_path / "vector").manifest.precision_loss is not None


def test_help_lists_the_same_choices_as_the_library(lata):
    _, printed, _ = lata("merge --help")
    for choice in (*WEIGHTINGS, *LEVELS, *STARTS):
        assert re.search(rf"[ |]{choice}[|\n]", printed), choice


def test_help_needs_neither_torch_nor_transformers():
    code = (
        "import sys, lata_lightning\n"
        "from lata_lightning.cli.main import COMMANDS, main, parser_of\n"
        "[parser_of(name).format_help() for name in COMMANDS]\n"
        "print([name for name in ('torch', 'transformers', 'lightning', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_merge_of_plain_models_imports_neither_transformers_nor_sharded_tensors(tmp_path):
    checkpoints = Path(lata_lightning.__file__).parent / "quickstart" / "checkpoints"
    command = ["merge", str(checkpoints / "base"), str(checkpoints / "instruct"), "--start", "base", "--output", str(tmp_path / "merged")]
    code = (
        f"import sys; from lata_lightning.cli.main import main; main({command})\n"
        "print([name for name in ('transformers', 'lightning', 'peft', 'torch.distributed.tensor', 'sympy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
