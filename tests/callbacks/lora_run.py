"""A LoRA fit under DDP on two processes, started by a test: python lora_run.py MODELS OUTPUT INIT"""

import json
import sys
import warnings
from pathlib import Path

import peft
import torch
from lightning_models import Module, batches, trainer
from transformers import LlamaForCausalLM

from lata_lightning import LATACallback

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    models, output, init = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"], init_lora_weights=init)
    # Unseeded: each process draws other factors, until DDP hands out those of the first.
    module = Module(peft.get_peft_model(LlamaForCausalLM.from_pretrained(models / "instruct"), config))
    callback = LATACallback(models / "instruction", output_dir=output / "lata", every_n_train_steps=2)
    run = trainer(output, callback, strategy="ddp", devices=2)
    run.fit(module, batches(8))
    (output / f"rank{run.global_rank}").write_text(repr((run.callback_metrics["lata/alignment"].item(), callback.alignment.values)))
    if run.is_global_zero:
        module.model.double().merge_and_unload().save_pretrained(output / "tuned")
