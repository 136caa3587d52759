"""Runs of ``lata fit --config classify`` on tiny classifiers of two tasks with other numbers of classes, and what transformers itself makes of them."""

import json
import random
from pathlib import Path

import torch
from passed_warnings import CHECKPOINTS_EXIST, EMPTY_LOADER, FEW_BATCHES, FEW_WORKERS, JSONARGPARSE, LEAF_SPEC
from safetensors.torch import load_file, save_file
from tokenizers_of_kinds import bert
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
)

from lata_lightning.cli.main import main

ENCODERS = ("plain", "masked", "headed")
STARTS = (*ENCODERS, "decoder")
TASKS = {
    "three": {"low": "abc", "mid": "mno", "high": "xyz"},
    "five": {"e": "abc", "d": "fgh", "c": "klm", "b": "pqr", "a": "xyz"},
}
FILTERS = [FEW_WORKERS, LEAF_SPEC, FEW_BATCHES, EMPTY_LOADER, CHECKPOINTS_EXIST, JSONARGPARSE]


def fit(start, task, output, *more):
    return main(
        [
            "fit", "--config", "classify", "--model.model", start, "--model.num_labels", str(len(TASKS[task])), "--model.learning_rate", "0.01",
            "--model.schedule", "constant", "--model.warmup_steps", "0", "--data.batch_size", "8",
            "--data.data", f"{task}.jsonl", "--data.validation_share", "0", "--trainer.max_epochs", "4", "--trainer.accelerator", "cpu",
            "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false", "--output", output, *more,
        ]
    )  # fmt: skip


def encoder_config(**more):
    sizes = {"vocab_size": 270, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertConfig(**sizes, **still, initializer_range=0.2, max_position_embeddings=64, pad_token_id=256, **more)


def save_without_prefix(model, directory):
    """A language model stored as GPT-2 is on the hub: names of the body alone, and the class with a head in the config."""
    model.save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert not bare.keys() & tensors.keys()
    save_file(bare, directory / "model.safetensors", metadata={"format": "pt"})


def make(directory):
    """Starts of each kind, and a fine-tune of each for each task: encoders without a head, with a masked-language head and with four classes; and
    a decoder that is stored without the prefix of its class."""
    torch.manual_seed(0)
    encoder, headed = BertModel(encoder_config()), BertForSequenceClassification(encoder_config(num_labels=4))
    for name, model in zip(ENCODERS, (encoder, BertForMaskedLM(encoder_config()), headed), strict=True):
        model.base_model.load_state_dict(encoder.state_dict(), strict=False)
        model.save_pretrained(directory / name)
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"vocab_size": 270, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.2}
    save_without_prefix(GPT2LMHeadModel(GPT2Config(**sizes, **still, pad_token_id=256, eos_token_id=258)), directory / "decoder")
    for start in STARTS:
        bert().save_pretrained(directory / start)
    write_tasks(directory)
    for start in STARTS:
        for task in TASKS:
            assert fit(start, task, f"{start}-{task}", "--trainer.enable_checkpointing", "false") == 0


def write_tasks(directory):
    """Twelve texts of each class, task by task."""
    generator = random.Random(0)
    for task, classes in TASKS.items():
        rows = [{"text": "".join(generator.choices(letters, k=5)), "label": label} for _ in range(12) for label, letters in classes.items()]
        (directory / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(task):
    return [json.loads(line) for line in Path(f"{task}.jsonl").read_text().splitlines()]


def inputs_of(tokenizer, task, count=None):
    """Tokens of each text by itself, as its tokenizer gives them."""
    return [tokenizer(row["text"], return_tensors="pt") for row in rows_of(task)[:count]]


def accuracy(encoder, run, task):
    """What transformers itself gives for an encoder with the head of a run, one text at a time."""
    labels = sorted(TASKS[task])
    model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=len(labels), ignore_mismatched_sizes=True).eval()
    missing = model.load_state_dict(load_file(f"{run}/lata/head.safetensors"), strict=False)
    assert not missing.unexpected_keys
    inputs = inputs_of(AutoTokenizer.from_pretrained(encoder), task)
    with torch.no_grad():
        found = [labels[model(**text).logits.argmax()] == row["label"] for text, row in zip(inputs, rows_of(task), strict=True)]
    return sum(found) / len(found)
