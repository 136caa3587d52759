import json
from types import SimpleNamespace

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from lata_lightning.errors import LataError, SourceError
from lata_lightning.quickstart.experts import INSTRUCT
from lata_lightning.quickstart.make_checkpoints import make_tokenizer
from lata_lightning.rows.tokens import TokenRow, chat_rows, collate, conversation_segments, packed
from lata_lightning.training.text_data import TextDataModule, load_training_tokenizer

PAIRS = [(f"ask {number}", f"say {number * number}") for number in range(12)]
SMALL = {
    "vocab_size": 260,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 257,
    "bos_token_id": None,
    "eos_token_id": 256,
}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(path, count=12):
    return write(path, [{"prompt": prompt, "completion": answer} for prompt, answer in PAIRS[:count]])


def module(data, **changes):
    """A module that is set up, for batches of two rows."""
    made = TextDataModule(data, **({"tokenizer": str(INSTRUCT), "batch_size": 2, "context_length": 32} | changes))
    made.setup("fit")
    return made


def trainer(rank=0, replicas=1, epoch=0):
    return SimpleNamespace(distributed_sampler_kwargs={"num_replicas": replicas, "rank": rank}, current_epoch=epoch)


def prompts(data, epoch=0):
    """The prompts of an epoch in the order they come, padding and markers taken off."""
    loader = data.train_dataloader()
    if hasattr(loader.sampler, "set_epoch"):
        loader.sampler.set_epoch(epoch)
    texts = [text for batch in loader for text in data.tokenizer.batch_decode(batch["input_ids"])]
    return [text.split("<|assistant|>")[0].removeprefix("<|user|>") for text in texts]


def test_every_turn_of_the_assistant_is_learned_and_nothing_else(tmp_path, tokenizer):
    turns = [("user", "hi"), ("assistant", "yo"), ("user", "so"), ("assistant", "ok"), ("user", "left out")]
    data = module(write(tmp_path / "rows.jsonl", [{"messages": [{"role": role, "content": content} for role, content in turns]}]))
    (batch,) = data.train_dataloader()
    spoken = [tokenizer(text)["input_ids"] for _, text in turns]
    user, assistant, end = (tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("user", "assistant", "end"))
    heads, tails = [[user, *spoken[0], assistant], [user, *spoken[2], assistant]], [[*spoken[1], end], [*spoken[3], end]]
    assert batch["input_ids"].tolist() == [heads[0] + tails[0] + heads[1] + tails[1]]
    assert batch["labels"].tolist() == [[-100] * 4 + tails[0] + [-100] * 4 + tails[1]]
    assert set(batch) == {"input_ids", "labels"}


def test_pairs_are_conversations_of_two_turns_whatever_their_columns_are_called(tmp_path, tokenizer):
    data = module(write(tmp_path / "rows.jsonl", [{"q": "hi", "a": "yo", "text": "unused"}]), columns=["q", "a"])
    (batch,), (row,) = data.train_dataloader(), chat_rows(tokenizer, [("hi", "yo")], longest=32)
    assert batch["input_ids"].tolist() == [row.input_ids.tolist()]
    assert batch["labels"].tolist() == [row.labels.tolist()]


def test_plain_pairs_need_no_template_and_end_with_the_end_token(tmp_path, tokenizer):
    data = module(write(tmp_path / "rows.jsonl", [{"prompt": "2+2=", "completion": "4"}]), template="plain")
    (batch,) = data.train_dataloader()
    answer = [*tokenizer("4")["input_ids"], 256]
    assert batch["input_ids"].tolist() == [tokenizer("2+2=")["input_ids"] + answer]
    assert batch["labels"].tolist() == [[-100] * 4 + answer]


def test_a_long_text_is_several_rows_that_are_learned_whole(tmp_path):
    data = module(write(tmp_path / "rows.jsonl", [{"text": "abcdefghij"}, {"text": "xyz"}]), context_length=4, batch_size=9)
    (batch,) = data.train_dataloader()
    texts = sorted(text.replace("<|pad|>", "") for text in data.tokenizer.batch_decode(batch["input_ids"]))
    assert texts == ["abcd", "efgh", "ij<|end|>", "xyz<|end|>"]
    assert torch.equal(batch["labels"].where(batch["labels"] != -100, 257), batch["input_ids"])


def test_packed_rows_begin_anew_and_do_not_learn_their_first_token():
    rows = [TokenRow(torch.arange(length) + 10, torch.arange(length) + 10) for length in (3, 2, 4, 1)]
    first, second = packed(rows, context_length=5)
    assert first.input_ids.tolist() == [10, 11, 12, 10, 11]
    assert first.labels.tolist() == [-100, 11, 12, -100, 11]
    assert first.position_ids.tolist() == [0, 1, 2, 0, 1]
    assert second.position_ids.tolist() == [0, 1, 2, 3, 0]
    assert rows[0].labels.tolist() == [10, 11, 12]


@pytest.mark.parametrize(
    ("kind", "config"), [(LlamaForCausalLM, LlamaConfig), (Gemma2ForCausalLM, Gemma2Config), (Qwen2ForCausalLM, Qwen2Config)]
)
def test_no_packed_row_sees_another_one(tokenizer, kind, config):
    model = kind(config(**SMALL)).double().eval()
    rows = chat_rows(tokenizer, PAIRS[:5], longest=32)
    batch = collate(list(packed(rows, context_length=32)), 257)
    assert batch["input_ids"].shape[0] == 3
    with torch.no_grad():
        together = model(**batch, use_cache=False)
        alone = [model(input_ids=row.input_ids[None], labels=row.labels[None]) for row in rows]
    real = torch.cat([torch.tensor([len(row.input_ids) for row in pair]) for pair in (rows[0:2], rows[2:4], rows[4:])])
    found = [logits[: sum(lengths)] for logits, lengths in zip(together.logits, (real[0:2], real[2:4], real[4:]), strict=True)]
    # Norms and losses are taken in float32 whatever the model's dtype is; a row that sees another one is off by more than 1e-3.
    torch.testing.assert_close(torch.cat(found), torch.cat([output.logits[0] for output in alone]), rtol=0, atol=1e-6)
    with torch.no_grad():
        seen = model(batch["input_ids"], use_cache=False).logits
    assert (seen - together.logits).abs().max() > 1e-3
    learned = torch.tensor([(row.labels != -100).sum() for row in rows])
    expected = (torch.stack([output.loss for output in alone]).double() * learned).sum() / learned.sum()
    assert together.loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_packing_keeps_every_token_and_gives_fewer_rows(tmp_path):
    path = pairs(tmp_path / "rows.jsonl")
    batches = list(module(path, packing=True, context_length=64).train_dataloader())
    alone = list(module(path).train_dataloader())
    assert sum(len(batch["input_ids"]) for batch in batches) < sum(len(batch["input_ids"]) for batch in alone)
    learned = [sum(int((batch["labels"] != -100).sum()) for batch in found) for found in (batches, alone)]
    assert learned[0] == learned[1]
    assert all(batch["position_ids"].shape == batch["input_ids"].shape for batch in batches)


def test_rows_held_out_are_the_same_in_every_run_and_never_trained_on(tmp_path):
    path = pairs(tmp_path / "rows.jsonl")
    data, again = module(path, validation_share=0.3), module(path, validation_share=0.3)
    held = [data.tokenizer.batch_decode(batch["input_ids"]) for batch in data.val_dataloader()]
    assert held == [again.tokenizer.batch_decode(batch["input_ids"]) for batch in again.val_dataloader()]
    trained = prompts(data) + prompts(data, epoch=1)
    assert len(set(trained)) + sum(map(len, held)) == 12
    assert not any(f"<|user|>{prompt}<|assistant|>" in text for prompt in trained for batch in held for text in batch)


def test_validation_data_of_its_own_comes_in_its_order(tmp_path):
    validation = write(tmp_path / "held.jsonl", [{"prompt": "b", "completion": "x"}, {"prompt": "a", "completion": "y"}])
    data = module(pairs(tmp_path / "rows.jsonl"), validation=validation)
    (batch,) = data.val_dataloader()
    assert data.tokenizer.batch_decode(batch["input_ids"]) == ["<|user|>b<|assistant|>x<|end|>", "<|user|>a<|assistant|>y<|end|>"]
    assert module(pairs(tmp_path / "rows.jsonl")).val_dataloader() == []


def test_the_order_of_rows_depends_on_seed_and_epoch_only(tmp_path):
    path = pairs(tmp_path / "rows.jsonl")
    data = module(path)
    assert sorted(prompts(data)) == sorted(prompt for prompt, _ in PAIRS)
    assert prompts(data) == prompts(module(path))
    assert prompts(data) != prompts(data, epoch=1)
    assert prompts(data) != prompts(module(path, seed=1))


def test_two_processes_share_the_rows_of_an_epoch(tmp_path):
    path = pairs(tmp_path / "rows.jsonl")
    found = []
    for rank in range(2):
        data = module(path)
        data.trainer = trainer(rank, 2)
        found.append(prompts(data))
    assert len(found[0]) == len(found[1]) == 6
    assert sorted(found[0] + found[1]) == sorted(prompt for prompt, _ in PAIRS)


def streamed(path, rank=0, replicas=1, **changes):
    data = module(path, streaming=True, **({"batches_per_epoch": 3} | changes))
    data.trainer = trainer(rank, replicas)
    return data


def epochs(data, numbers):
    loader = data.train_dataloader()
    found = []
    for number in numbers:
        data.trainer.current_epoch = number
        found.append([text.replace("<|pad|>", "") for batch in loader for text in data.tokenizer.batch_decode(batch["input_ids"])])
    return found


def test_a_stream_goes_on_where_the_epoch_before_ended(tmp_path):
    path = pairs(tmp_path / "rows.jsonl")
    first, second, third = epochs(streamed(path), [0, 1, 2])
    assert len(set(first) | set(second)) == 12
    assert set(third) <= set(first) | set(second)
    assert third != first


def test_a_resumed_stream_goes_on_with_the_rows_that_would_have_come(tmp_path):
    path = pairs(tmp_path / "rows.jsonl")
    whole = epochs(streamed(path), [0, 1, 2, 3])
    assert epochs(streamed(path), [2, 3]) == whole[2:]
    data = streamed(path)
    assert epochs(data, [0, 3, 1]) == [whole[0], whole[3], whole[1]]


def test_two_processes_share_a_stream(tmp_path):
    path = pairs(tmp_path / "rows.jsonl")
    (one,), (other,) = (epochs(streamed(path, rank, 2), [0]) for rank in range(2))
    assert len(set(one)) == len(set(other)) == 6
    assert not set(one) & set(other)


def test_a_stream_is_packed_too_and_leaves_long_rows_out(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "a" * length, "completion": "b"} for length in (1, 90, 2, 3)])
    data = streamed(path, packing=True, too_long="drop", batches_per_epoch=2)
    batches = list(data.train_dataloader())
    # Rows of 5, 6 and 7 tokens come round and round, never more than 32 together.
    assert all((batch["position_ids"] == 0).sum() >= 2 * 4 for batch in batches)
    assert max(batch["input_ids"].shape[1] for batch in batches) <= 32


def test_the_tokenizer_is_that_of_the_model_in_training_unless_given(tmp_path):
    data = TextDataModule(pairs(tmp_path / "rows.jsonl"))
    data.trainer = trainer()
    data.trainer.lightning_module = SimpleNamespace(model=SimpleNamespace(name_or_path=str(INSTRUCT)))
    data.setup("fit")
    assert data.tokenizer.name_or_path == str(INSTRUCT)
    data.trainer.lightning_module.model.name_or_path = ""
    with pytest.raises(LataError, match="where the model in training comes from is not known"):
        TextDataModule.setup(TextDataModule(data.data), "fit")


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path, tokenizer):
    bare = make_tokenizer()
    bare.pad_token = None
    bare.save_pretrained(tmp_path / "bare")
    data = module(write(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": "abc"}]), tokenizer=str(tmp_path / "bare"))
    (batch,) = data.train_dataloader()
    assert 256 in batch["input_ids"][:, 2:]
    assert (batch["labels"] == -100).sum() == 2


def test_a_missing_column_is_refused(tmp_path):
    path = pairs(tmp_path / "rows.jsonl")
    for more in ({}, {"streaming": True, "batches_per_epoch": 1}):
        with pytest.raises(LataError, match="no column 'answer'; its columns are 'prompt', 'completion'"):
            module(path, columns=["prompt", "answer"], **more)
    with pytest.raises(LataError, match=r"must hold 'messages', .*it holds 2: \['input', 'promt'\]\. The nearest form is 'prompt' and"):
        module(write(tmp_path / "other.jsonl", [{"promt": "a", "input": "b"}]))


@pytest.mark.parametrize("row", [{"prompt": "a", "completion": None}, {"prompt": "a", "completion": ""}, {"messages": []}])
def test_a_row_without_a_value_is_refused(tmp_path, row):
    full = (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
        if "messages" in row
        else {"prompt": "a", "completion": "b"}
    )
    with pytest.raises(LataError, match="row 2 has nothing in column '(completion|messages)'"):
        module(write(tmp_path / "rows.jsonl", [full, row]))


def test_what_is_no_conversation_is_refused(tmp_path):
    for number, row in enumerate([[{"from": "user", "value": "a"}], [1, 2]]):
        with pytest.raises(LataError, match="a list of turns with 'role' and 'content'; row 1 has none in 'messages'"):
            module(write(tmp_path / f"{number}.jsonl", [{"messages": row}]))
    with pytest.raises(LataError, match="'prompt' and 'completion' must be text; row 1 holds a int there"):
        module(write(tmp_path / "numbers.jsonl", [{"prompt": "a", "completion": 4}]))


def test_a_conversation_without_an_answer_or_with_a_role_the_template_refuses_is_refused(tmp_path):
    with pytest.raises(LataError, match="needs a turn of the assistant.*begins 'hello'"):
        module(write(tmp_path / "rows.jsonl", [{"messages": [{"role": "user", "content": "hello"}]}]))
    turns = [{"role": "system", "content": "be brief"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(LataError, match="refuses a conversation: the roles are user and assistant; it begins 'be brief'"):
        module(write(tmp_path / "system.jsonl", [{"messages": turns}]))


def test_a_template_that_changes_what_was_said_is_refused(tmp_path):
    changing = make_tokenizer()
    changing.chat_template = "{{ messages | length }}{{ messages[0]['content'] }}"
    changing.save_pretrained(tmp_path / "changing")
    with pytest.raises(LataError, match="renders the conversation in row 1 differently once it goes on"):
        module(pairs(tmp_path / "rows.jsonl"), tokenizer=str(tmp_path / "changing"))
    assert conversation_segments(changing, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]) is None


def test_pairs_without_a_chat_template_are_refused(tmp_path):
    bare = make_tokenizer()
    bare.chat_template = None
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(LataError, match=r"'.*bare' has no chat template, .*template 'plain'"):
        module(pairs(tmp_path / "rows.jsonl"), tokenizer=str(tmp_path / "bare"))
    module(pairs(tmp_path / "rows.jsonl"), tokenizer=str(tmp_path / "bare"), template="plain")


def test_rows_that_are_too_long_are_refused_or_left_out(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a" * 40, "completion": "b"}])
    with pytest.raises(LataError, match="at most 32 tokens; 1 have more, the first is row 2"):
        module(path)
    assert prompts(module(path, too_long="drop")) == ["a"]
    with pytest.raises(LataError, match="none of 2 rows has at most 2 tokens"):
        module(path, too_long="drop", context_length=2)


def test_a_stream_that_gives_nothing_is_refused(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "a" * 40, "completion": "b"}])
    with pytest.raises(LataError, match="gives no row to learn from"):
        list(streamed(path, too_long="drop").train_dataloader())
    (tmp_path / "empty.csv").write_text("text\n")
    with pytest.raises(LataError, match="holds no row"):
        streamed(str(tmp_path / "empty.csv"))


def test_a_tokenizer_that_is_not_there_or_has_no_end_is_refused(tmp_path):
    with pytest.raises(SourceError, match="holds no tokenizer that can be loaded"):
        load_training_tokenizer(str(tmp_path))
    endless = make_tokenizer()
    endless.eos_token = None
    endless.save_pretrained(tmp_path / "endless")
    with pytest.raises(LataError, match="has no end token"):
        load_training_tokenizer(str(tmp_path / "endless"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size and shuffle_buffer must be at least 1"),
        ({"context_length": 1}, "context_length at least 2"),
        ({"validation_share": 1.0}, r"validation_share in \[0, 1\)"),
        ({"streaming": True}, "batches_per_epoch must be given with streaming"),
        ({"batches_per_epoch": 3}, "and only then; it is 3"),
        ({"streaming": True, "batches_per_epoch": 0}, "it is 0"),
        ({"validation_share": 0.1, "validation": "other.jsonl"}, "with neither validation nor streaming"),
        ({"validation_share": 0.1, "streaming": True, "batches_per_epoch": 1}, "with neither validation nor streaming"),
        ({"columns": ["a", "b", "c"]}, "or two of prompts and completions, got 3"),
    ],
)
def test_settings_out_of_range_or_against_each_other_are_refused(settings, message):
    with pytest.raises(LataError, match=message):
        TextDataModule("rows.jsonl", **settings)


def test_a_loader_before_setup_is_refused():
    with pytest.raises(LataError, match=r"call setup\(\)"):
        TextDataModule("rows.jsonl").train_dataloader()
