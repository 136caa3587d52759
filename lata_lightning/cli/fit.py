"""``lata fit``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from itertools import pairwise

from jsonargparse import ArgumentParser, Namespace

from lata_lightning.cli.common import Command
from lata_lightning.cli.examples import EXAMPLES
from lata_lightning.cli.shipped import recipe
from lata_lightning.store.output_policy import OutputPolicy, output_policy

_SUMMARY = "Fine-tune a model as a recipe says, and keep its task vector."
HELP = f"""usage: lata fit --config RECIPE [options]

{_SUMMARY}

options that most runs use:
  --config RECIPE                Name of a shipped recipe (lata recipes) or a YAML file; several are read in order, later ones win.
  --output DIR                   Directory for what the run leaves: lata/, checkpoints/ and logs/. Default: run.
  --model.model MODEL            Directory or hub id of the model to fine-tune.
  --data.data FILE               Conversations, prompts with completions, or texts: JSONL, CSV, Parquet or a data set of the hub.
  --lata.instruction_vector DIR  Instruction vector to measure the alignment with.
  --model.learning_rate NUMBER   Peak learning rate.
  --trainer.max_epochs N         Passes over the data.
  --trainer.accelerator NAME     cpu, gpu, mps or auto.
  --ckpt_path FILE               Checkpoint to resume from; 'last' for the newest of the run.
  --dry-run                      Check the configuration and the output, say what would be read and written, and train nothing.
  --overwrite                    Replace an earlier run in DIR; it is removed when the new one is finished.
  --print_config                 Print the whole configuration and exit.
  -h, --help                     Show this help.
  --help-all                     Show every option of Trainer, model, data and callback.

examples:
{chr(10).join(f"  {line}" for line in EXAMPLES["fit"])}
"""


def _arguments(parser: ArgumentParser) -> None:
    """None: they are those of the Trainer and of the classes a recipe names, which Lightning's own parser reads."""


def _run(options: Namespace, command: str) -> None:
    words = shlex.split(command)[1:]
    if "-h" in words or "--help" in words:
        sys.stdout.write(HELP)
        return
    from lata_lightning.cli.fit_parser import FitParser
    from lata_lightning.training.command import FitCLI

    words = ["--help" if word == "--help-all" else word for word in words]
    # No part of the configuration that a run saves, from which it may be run again.
    policy = OutputPolicy(overwrite=_switched_on(words, "--overwrite"), dry_run=_switched_on(words, "--dry-run"))
    words = [word for word in words if word.partition("=")[0] not in ("--overwrite", "--dry-run")]
    from lata_lightning.training.quiet import quiet

    with output_policy(policy), quiet():
        FitCLI([recipe(word) if before in ("-c", "--config") else word for before, word in pairwise(["", *words])], FitParser)


def _switched_on(words: Sequence[str], option: str) -> bool:
    return any(word in (option, f"{option}=true") for word in words)


COMMANDS = {"fit": Command(_SUMMARY, _arguments, _run, parses_itself=True)}
