import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lata_lightning.linearity.regression import regress
from lata_lightning.linearity.samples import positions_of
from lata_lightning.linearity.scores import measure_linearity
from lata_lightning.linearity.solving import solve_coefficients
from lata_lightning.vectors.task_vector import TaskVector

MARKS = {"bos_token_id": None, "eos_token_id": None}


def llama():
    """The widest layer takes in 24 numbers, in the MLP."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, **MARKS
        )
    )


def gpt2():
    """The widest layer takes in 64 numbers, in a Conv1D of the MLP."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=32, **MARKS))


def rows(count, length):
    return [{"input_ids": torch.randint(0, 30, (count, length)), "attention_mask": torch.ones(count, length, dtype=torch.long)}]


def sentences(call, make, samples):
    start, tuned = make(), make()
    said = []
    call(start, [TaskVector.between(start, tuned)], samples, said.append)
    return said


CALLS = [
    lambda start, vectors, samples, note: regress(vectors, start, samples, note=note),
    lambda start, vectors, samples, note: solve_coefficients(start, vectors, samples, note=note),
    lambda start, vectors, samples, note: measure_linearity(start, vectors, samples, note=note),
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("make", "width"), [(llama, 24), (gpt2, 64)])
def test_fewer_positions_than_twice_the_widest_layer_are_named_with_the_rows_it_takes(call, make, width):
    (said,) = sentences(call, make, [rows(2, 8)])
    assert f"have 16 positions, and the widest layer takes in {width} numbers: fewer than {2 * width} positions" in said
    assert f"Give about {2 * width * 2 // 16} rows of this length (--samples)" in said


@pytest.mark.parametrize("call", CALLS)
def test_enough_positions_are_not_mentioned(call):
    assert sentences(call, llama, [rows(6, 8)]) == []


def test_padding_is_no_position_and_inputs_without_tokens_have_none():
    batch = rows(2, 4)[0]
    batch["attention_mask"][1, 2:] = 0
    assert positions_of([batch]) == 6
    assert positions_of([{"input_ids": batch["input_ids"]}]) == 8
    assert positions_of([{"pixel_values": torch.zeros(1, 3, 4, 4)}]) is None
