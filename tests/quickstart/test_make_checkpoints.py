import pytest
import torch
from passed_warnings import EMPTY_LOADER, FEW_WORKERS, LEAF_SPEC
from transformers import AutoModelForCausalLM, AutoTokenizer

from lata_lightning.errors import OutputError
from lata_lightning.quickstart import make_checkpoints
from lata_lightning.quickstart.make_checkpoints import CHECKPOINTS, main, make_tokenizer

pytestmark = [FEW_WORKERS, LEAF_SPEC, EMPTY_LOADER]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    output = tmp_path_factory.mktemp("made") / "checkpoints"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "standard_library_texts": lambda: ["text " * 100],
            "held_out_text": lambda: "text " * 100,
            "TRAIN_EXERCISES": 20,
            "INSTRUCT_EXERCISES_BY_SKILL": {},
            "TEST_EXERCISES": 3,
            "TOKENS_PER_BATCH": 256,
        }.items():
            patch.setattr(make_checkpoints, name, value)
        assert main(["--output", str(output), "--seed", "3", "--base-steps", "2", "--instruct-steps", "2"]) == 0
        yield output


@pytest.mark.parametrize("name", ["base", "instruct"])
def test_both_are_hugging_face_directories_with_a_card_that_holds_their_scores(made, name):
    assert AutoModelForCausalLM.from_pretrained(made / name).num_parameters() == 936_288
    assert AutoTokenizer.from_pretrained(made / name).chat_template == make_tokenizer().chat_template
    card = (made / name / "README.md").read_text()
    assert "--seed 3" in card
    assert f"| copy | 0.0% | {'yes' if name == 'instruct' else 'no'} |" in card
    assert "| reverse | 0.0% | no |" in card


def test_instruct_starts_from_base(made):
    base, instruct = (AutoModelForCausalLM.from_pretrained(made / name).state_dict() for name in ("base", "instruct"))
    for name, tensor in base.items():
        assert 0 < (instruct[name] - tensor).abs().max() < 0.01, name


def test_instruct_made_again_from_the_same_base_has_the_same_bytes(made, tmp_path):
    main(["--output", str(tmp_path), "--seed", "3", "--base", str(made / "base"), "--instruct-steps", "2"])
    assert not (tmp_path / "base").exists()
    again, before = (folder / "instruct" / "model.safetensors" for folder in (tmp_path, made))
    assert again.read_bytes() == before.read_bytes()


def test_a_folder_that_is_there_already_is_left_alone(made):
    with pytest.raises(OutputError, match="already holds base and instruct"):
        main(["--output", str(made)])


def test_a_byte_is_a_token_and_every_text_comes_back():
    tokenizer = make_tokenizer()
    text = "naïve 'n't  \n\tεκ 12 ."
    assert len(tokenizer(text)["input_ids"]) == len(text.encode())
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_chat_template_writes_turns_and_refuses_other_roles():
    tokenizer = make_tokenizer()
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}, {"role": "user", "content": "so"}]
    written = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert written == "<|user|>hi<|assistant|>yo<|end|><|user|>so<|assistant|>"
    with pytest.raises(Exception, match="the roles are user and assistant"):
        tokenizer.apply_chat_template([{"role": "system", "content": "hi"}], tokenize=False)


@pytest.mark.parametrize("name", ["base", "instruct"])
def test_the_shipped_checkpoints_load_offline_and_have_this_tokenizer(name):
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINTS / name)
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINTS / name)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
