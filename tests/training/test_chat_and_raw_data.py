from collections import Counter

import pytest
import torch

from lata_lightning.errors import LataError
from lata_lightning.quickstart.make_checkpoints import make_tokenizer
from lata_lightning.rows.tokens import chat_rows, collate, raw_tokens
from lata_lightning.training.batches import MixtureBatchSampler
from lata_lightning.training.data import ChatDataModule, RawTextDataModule

GROUPS = {"short": [("a", "b"), ("c", "d")], "long": [("question", "answer")]}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def ids(tokenizer, text):
    return tokenizer(text)["input_ids"]


def sampler(**changes):
    settings = {
        "groups": [range(0, 10), range(10, 14)],
        "shares": [3.0, 1.0],
        "windows": range(14, 114),
        "raw_share": 0.25,
        "rows_per_batch": 4,
        "windows_per_batch": 2,
        "batches": 200,
        "seed": 5,
    }
    return MixtureBatchSampler(**(settings | changes))


def test_a_chat_row_is_question_and_answer_and_only_the_answer_and_its_end_are_learned(tokenizer):
    (row,) = chat_rows(tokenizer, [("hi", "yo")], longest=32)
    pad, end, user, assistant = (tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("pad", "end", "user", "assistant"))
    assert row.input_ids.tolist() == [user, *ids(tokenizer, "hi"), assistant, *ids(tokenizer, "yo"), end]
    assert row.labels.tolist() == [-100] * 4 + [*ids(tokenizer, "yo"), end]
    assert (pad, end) == (tokenizer.pad_token_id, tokenizer.eos_token_id)


def test_padding_is_on_the_right_and_not_learned(tokenizer):
    batch = collate(chat_rows(tokenizer, [("a", "b"), ("abc", "b")], longest=32), pad_token_id=256)
    assert batch["input_ids"].shape == (2, 7)
    assert batch["input_ids"][0, 5:].tolist() == [256, 256]
    assert batch["labels"][0, 5:].tolist() == [-100, -100]


def test_raw_text_is_one_line_of_tokens_with_the_end_after_every_document(tokenizer):
    tokens = raw_tokens(tokenizer, ["ab", "ä"], context_length=3)
    assert tokens.tolist() == [*ids(tokenizer, "ab"), 256, *ids(tokenizer, "ä"), 256]
    assert len(tokens) == 2 + 1 + 2 + 1


def test_every_group_has_its_share_of_the_chat_rows():
    drawn = Counter(index >= 10 for batch in sampler() if batch[0] < 14 for index in batch)
    # 150 chat batches of 4 rows, three quarters of them of the first group; 4 standard deviations of a share of 600
    # rows are 7 %.
    assert drawn.total() == 600
    assert drawn[False] / 600 == pytest.approx(0.75, abs=0.07)


def test_every_fourth_batch_is_raw_at_a_share_of_a_quarter():
    kinds = [batch[0] >= 14 for batch in sampler()]
    assert kinds == [False, False, False, True] * 50


def test_a_group_is_gone_through_before_a_row_comes_again():
    rows = [index for batch in sampler(groups=[range(8)], shares=[1.0], raw_share=0.0, batches=4) for index in batch]
    assert sorted(rows[:8]) == sorted(rows[8:]) == list(range(8))
    assert rows[:8] != rows[8:]


def test_the_order_depends_on_seed_and_epoch_only():
    first, same, other = sampler(), sampler(), sampler(seed=6)
    assert list(first) == list(same) == list(first)
    assert list(first) != list(other)
    first.set_epoch(1)
    assert list(first) != list(same)
    same.set_epoch(1)
    assert list(first) == list(same)


def test_batches_hold_about_the_token_budget_of_either_kind(tokenizer):
    data = ChatDataModule(
        tokenizer,
        GROUPS,
        raw_texts=["raw text " * 20],
        raw_share=0.5,
        batches_per_epoch=4,
        tokens_per_batch=68,
        context_length=20,
    )
    data.setup("fit")
    chat, raw, *rest = data.train_dataloader()
    # The longest row is user + 8 + assistant + 6 + end = 17 tokens, so four rows; three windows of 20 tokens.
    assert len(rest) == 2
    assert chat["input_ids"].shape[0] == 4
    assert raw["input_ids"].shape == (3, 20)
    assert torch.equal(raw["input_ids"], raw["labels"])
    assert (chat["labels"] == -100).any()


def test_a_share_of_nearly_one_leaves_hardly_anything_of_the_others(tokenizer):
    data = ChatDataModule(tokenizer, GROUPS, {"short": 1e-9, "long": 1.0}, batches_per_epoch=5, tokens_per_batch=85)
    data.setup("fit")
    assert all(batch["input_ids"].shape == (5, 17) for batch in data.train_dataloader())


def test_validation_pairs_come_in_the_order_given(tokenizer):
    data = ChatDataModule(tokenizer, GROUPS, validation=[("a", "b"), ("question", "answer"), ("c", "d")], tokens_per_batch=34)
    data.setup("fit")
    first, second = data.val_dataloader()
    assert first["input_ids"].shape == (2, 17)
    assert second["input_ids"].shape == (1, 5)


def test_without_validation_there_is_no_validation_loader(tokenizer):
    for data in (ChatDataModule(tokenizer, GROUPS), RawTextDataModule(tokenizer, ["x" * 200])):
        data.setup("fit")
        assert data.val_dataloader() == []


def test_raw_windows_are_cut_from_the_text_and_start_anywhere(tokenizer):
    text = "".join(chr(ord("a") + index % 26) for index in range(300))
    data = RawTextDataModule(tokenizer, [text], batches_per_epoch=50, tokens_per_batch=40, context_length=10)
    data.setup("fit")
    windows = [window for batch in data.train_dataloader() for window in tokenizer.batch_decode(batch["input_ids"])]
    assert len(windows) == 50 * 4
    assert all(window in text + "<|end|>" for window in windows)
    assert len({window[0] for window in windows}) > 20


def test_raw_validation_windows_do_not_overlap(tokenizer):
    data = RawTextDataModule(tokenizer, ["x" * 20], validation_texts=["abcdefghijk"], tokens_per_batch=8, context_length=4)
    data.setup("fit")
    assert [tokenizer.batch_decode(batch["labels"]) for batch in data.val_dataloader()] == [
        ["abcd", "efgh"],
        ["ijk<|end|>"],
    ]


def test_an_empty_group_is_refused(tokenizer):
    with pytest.raises(LataError, match=r"empty are 1: \['none'\]"):
        ChatDataModule(tokenizer, {"some": [("a", "b")], "none": []})


def test_shares_of_other_groups_are_refused(tokenizer):
    with pytest.raises(LataError, match=r"on one side only are 2: \['long', 'middle'\]"):
        ChatDataModule(tokenizer, GROUPS, {"short": 1.0, "middle": 1.0})


def test_a_share_of_nothing_is_refused(tokenizer):
    with pytest.raises(LataError, match=r"every share must be positive, not 0\.0"):
        ChatDataModule(tokenizer, GROUPS, {"short": 1.0, "long": 0.0})


@pytest.mark.parametrize(("raw_texts", "raw_share"), [(["text"], 0.0), ([], 0.5), (["text"], 1.0)])
def test_a_share_of_raw_text_without_raw_text_or_the_other_way_round_is_refused(tokenizer, raw_texts, raw_share):
    with pytest.raises(LataError, match="exactly if there are raw_texts"):
        ChatDataModule(tokenizer, GROUPS, raw_texts=raw_texts, raw_share=raw_share)


def test_a_row_longer_than_the_context_is_refused(tokenizer):
    with pytest.raises(LataError, match=r"at most 10 tokens; too long are 1: \['question'\]"):
        chat_rows(tokenizer, [("a", "b"), ("question", "answer")], longest=10)


def test_a_chat_template_that_changes_an_answered_question_is_refused():
    changing = make_tokenizer()
    changing.chat_template = "{{ messages | length }}{{ messages[0]['content'] }}"
    with pytest.raises(LataError, match="renders the conversation in pair 1 differently"):
        chat_rows(changing, [("a", "b")], longest=10)


def test_raw_text_shorter_than_one_window_is_refused(tokenizer):
    with pytest.raises(LataError, match="one window of 9 tokens, it has 4"):
        raw_tokens(tokenizer, ["abc"], context_length=9)


def test_raw_data_without_text_is_refused(tokenizer):
    with pytest.raises(LataError, match="at least one document"):
        RawTextDataModule(tokenizer, [])


def test_sizes_below_their_least_are_refused(tokenizer):
    with pytest.raises(LataError, match="at least 1 and context_length at least 2, not 1, 1 and 1"):
        RawTextDataModule(tokenizer, ["text"], batches_per_epoch=1, tokens_per_batch=1, context_length=1)


def test_a_loader_before_setup_is_refused(tokenizer):
    with pytest.raises(LataError, match=r"call setup\(\)"):
        RawTextDataModule(tokenizer, ["text"]).train_dataloader()
