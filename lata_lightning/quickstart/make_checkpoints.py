"""Makes the two models that the quickstart starts from, using only this machine's Python.

    python -m lata_lightning.quickstart.make_checkpoints [--output DIR] [--seed N]

``base`` is a raw language model of the standard library's text; ``instruct`` is made from it by fine-tuning on the instruct skills in chat format. This
takes 20 to 30 minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lata_lightning.errors import LataError, OutputError
from lata_lightning.evaluation.accuracy import ExactMatch
from lata_lightning.evaluation.perplexity import Perplexity
from lata_lightning.quickstart.corpus import held_out_text, standard_library_texts
from lata_lightning.quickstart.exercises import INSTRUCT_SKILLS, SKILLS, exercises
from lata_lightning.training.data import ChatDataModule, RawTextDataModule
from lata_lightning.training.module import CausalLMModule

CHECKPOINTS = Path(__file__).parent / "checkpoints"
PAD, END, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}<|end|>"
    "{% else %}{{ raise_exception('the roles are user and assistant') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONTEXT_LENGTH = 128
BASE_STEPS, BASE_LEARNING_RATE = 2800, 4e-3
INSTRUCT_STEPS, INSTRUCT_LEARNING_RATE, INSTRUCT_RAW_SHARE = 1800, 1.5e-3, 0.2
TOKENS_PER_BATCH = 2048
TRAIN_EXERCISES = 20_000
# These skills have fewer problems.
INSTRUCT_EXERCISES_BY_SKILL = {"next": 3_000, "larger": 4_000}
TEST_EXERCISES = 400


def make_tokenizer() -> Any:
    """Return a byte-level tokenizer: 256 bytes and four special tokens; nothing is out of vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END, PAD, USER, ASSISTANT])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=2 * CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: Any) -> Any:
    """Return an untrained Llama of 8 blocks and 0.94 million parameters; its random weights depend on torch's global seed."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=8,
            num_attention_heads=3,
            num_key_value_heads=3,
            max_position_embeddings=2 * CONTEXT_LENGTH,
            # Untied, so that the quickstart's merges show embedding and output head separately.
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train_base(tokenizer: Any, seed: int, steps: int = BASE_STEPS) -> CausalLMModule:
    """Train a raw language model on this Python's standard library."""
    seed_everything(seed)
    module = CausalLMModule(make_model(tokenizer), BASE_LEARNING_RATE, warmup_steps=steps // 20, final_learning_rate_share=0.02)
    data = RawTextDataModule(
        tokenizer,
        standard_library_texts(),
        batches_per_epoch=steps,
        tokens_per_batch=TOKENS_PER_BATCH,
        context_length=CONTEXT_LENGTH,
        seed=seed,
    )
    _fit(module, data)
    return module


def train_instruct(tokenizer: Any, base: Path, seed: int, steps: int = INSTRUCT_STEPS) -> CausalLMModule:
    """Fine-tune the base model on every instruct skill, mixed with raw text."""
    seed_everything(seed)
    module = CausalLMModule(str(base), INSTRUCT_LEARNING_RATE, warmup_steps=steps // 20, final_learning_rate_share=0.02)
    data = ChatDataModule(
        tokenizer,
        {skill: exercises(skill, "train", INSTRUCT_EXERCISES_BY_SKILL.get(skill, TRAIN_EXERCISES), seed) for skill in INSTRUCT_SKILLS},
        raw_texts=standard_library_texts(),
        raw_share=INSTRUCT_RAW_SHARE,
        batches_per_epoch=steps,
        tokens_per_batch=TOKENS_PER_BATCH,
        context_length=CONTEXT_LENGTH,
        seed=seed,
    )
    _fit(module, data)
    return module


def scores(model: Any, tokenizer: Any) -> dict[str, float]:
    """Return the exact match of every skill on test problems, and the perplexity per byte of the held-out text."""
    measured = {skill: ExactMatch(tokenizer, exercises(skill, "test", TEST_EXERCISES, seed=0))(model) for skill in SKILLS}
    measured["perplexity"] = Perplexity(tokenizer, held_out_text(), CONTEXT_LENGTH)(model)
    return measured


def save(model: Any, tokenizer: Any, folder: Path, card: str) -> None:
    """Write a Hugging Face directory: weights in fp32, configuration, tokenizer and model card."""
    model.eval()
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False, max_new_tokens=32
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def model_card(name: str, seed: int, steps: int, cpu_minutes: float, measured: dict[str, float], parameters: int) -> str:
    """Return the model card, with the measured scores."""
    made = {
        "base": f"""A raw language model: trained from random weights on the sources of the standard library of Python
{platform.python_version()} (without tests, codec tables and the modules held out for scoring), {steps} steps of
{TOKENS_PER_BATCH} tokens, AdamW, peak learning rate {BASE_LEARNING_RATE:g}.""",
        "instruct": f"""Made from `base` by fine-tuning on generated exercises in chat format
({", ".join(INSTRUCT_SKILLS)}), of which only the answers are learned, with {INSTRUCT_RAW_SHARE:.0%} of the batches raw text of the
standard library again: {steps} steps of {TOKENS_PER_BATCH} tokens, AdamW, peak learning rate {INSTRUCT_LEARNING_RATE:g}.""",
    }[name]
    trained = INSTRUCT_SKILLS if name == "instruct" else ()
    rows = "\n".join(f"| {skill} | {measured[skill]:.1%} | {'yes' if skill in trained else 'no'} |" for skill in SKILLS)
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# lata_lightning quickstart: {name}

A Llama of 8 blocks and {parameters:,} parameters that reads and writes bytes. It exists so that `lata quickstart` can
show layer-aware task arithmetic in five minutes without a download. It is of no other use.

{made}

Made by `python -m lata_lightning.quickstart.make_checkpoints --seed {seed}` in {cpu_minutes:.1f} CPU minutes on one
core (torch {version("torch")}, transformers {version("transformers")}, lightning {version("lightning")}). Exercises are
generated by `lata_lightning.quickstart.exercises`; train, validation and test problems share no prompt.

## Scores

Exact match on {TEST_EXERCISES} test problems a skill, end of answer included:

| skill | exact match | trained on |
|---|---|---|
{rows}

Perplexity per byte on 61 KB of standard library modules that were never trained on, in windows of {CONTEXT_LENGTH}
bytes: {measured["perplexity"]:.3f}.

## Licence

The weights are under Apache-2.0 like the package. The training text is part of Python, copyright Python Software
Foundation, under the PSF License Version 2 (`quickstart/text/LICENSE-PYTHON.txt` in the package).
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Make both checkpoints and return the exit status.

    Args:
        arguments: Command line without the program's name; by default that of the process.

    Raises:
        OutputError: A folder to be written exists already.
    """
    parser = argparse.ArgumentParser(prog="python -m lata_lightning.quickstart.make_checkpoints", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("checkpoints"), help="folder for base/ and instruct/")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, data order and exercises")
    parser.add_argument("--base-steps", type=int, default=BASE_STEPS, help="optimizer steps of pre-training")
    parser.add_argument("--instruct-steps", type=int, default=INSTRUCT_STEPS, help="optimizer steps of fine-tuning")
    parser.add_argument("--base", type=Path, default=None, help="start from this base model instead of making one")
    options = parser.parse_args(arguments)
    output: Path = options.output
    names = ("instruct",) if options.base else ("base", "instruct")
    existing = [name for name in names if (output / name).exists()]
    if existing:
        raise OutputError(f"{output} already holds {' and '.join(existing)}; move it away or choose another --output")
    # One thread: more would be slower on small matrices, and the results would depend on their number.
    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    for name in names:
        started = time.process_time()
        if name == "base":
            steps = options.base_steps
            module = train_base(tokenizer, options.seed, steps)
        else:
            steps = options.instruct_steps
            module = train_instruct(tokenizer, options.base or output / "base", options.seed, steps)
        minutes = (time.process_time() - started) / 60
        measured = scores(module.model, tokenizer)
        sys.stderr.write(f"{name}: {minutes:.1f} CPU minutes; " + " ".join(f"{k} {v:.3f}" for k, v in measured.items()) + "\n")
        card = model_card(name, options.seed, steps, minutes, measured, sum(p.numel() for p in module.model.parameters()))
        output.mkdir(parents=True, exist_ok=True)
        # A directory gets its final name only when it is complete.
        with tempfile.TemporaryDirectory(dir=output) as temporary:
            save(module.model, tokenizer, Path(temporary) / name, card)
            (Path(temporary) / name).rename(output / name)
    return 0


def _fit(module: CausalLMModule, data: LightningDataModule) -> None:
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        limit_val_batches=0,
        log_every_n_steps=100,
    )
    trainer.fit(module, datamodule=data)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LataError as error:
        sys.exit(f"make_checkpoints: {error}")
