"""LoRA fits under FSDP2 on two processes, started by a test: python fsdp_lora_run.py MODELS OUTPUT

Every case leaves a directory below OUTPUT, with the start and the tuned weights as whole float64 tensors, merged by hand.
"""

import logging
import sys
from pathlib import Path

import peft
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_models import Module, batches, leave_together, trainer
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM

from lata_lightning import LATACallback

# A rank that two processes share unevenly.
PLAIN = {"r": 5, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj", "down_proj"]}


class Adapted(Module):
    def __init__(self, start, adapters, policy=None):
        model = LlamaForCausalLM.from_pretrained(start)
        torch.manual_seed(0)
        first, *others = adapters
        model = peft.get_peft_model(model, peft.LoraConfig(**first))
        for number, config in enumerate(others):
            model.add_adapter(f"other{number}", peft.LoraConfig(**config))
        if others:
            model.base_model.set_adapter(["default", *(f"other{number}" for number in range(len(others)))])
        super().__init__(model.train())
        self.policy = policy or MixedPrecisionPolicy()

    def configure_model(self):
        if isinstance(self.model, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        for block in self.model.get_base_model().model.layers:
            fully_shard(block, mesh=mesh, mp_policy=self.policy)
        fully_shard(self.model, mesh=mesh, mp_policy=self.policy)

    def validation_step(self, batch, batch_idx):
        return self.model(input_ids=batch, labels=batch).loss


def merged(model):
    """Every weight with what the active adapters add to it, under the names of the model without them; float64."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()

    def whole(tensor):
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().double()

    base, found = model.get_base_model(), {}
    for name, parameter in base.named_parameters():
        if ".lora_" not in name and ".modules_to_save." not in name:
            found[name.replace(".base_layer", "").replace(".original_module", "")] = whole(parameter)
    for path, layer in base.named_modules():
        for adapter in layer.active_adapters if hasattr(layer, "lora_A") else ():
            if adapter in layer.lora_A:
                product = whole(layer.lora_B[adapter].weight) @ whole(layer.lora_A[adapter].weight)
                found[f"{path}.weight"] = found[f"{path}.weight"] + layer.scaling[adapter] * product
        if hasattr(layer, "modules_to_save") and "default" in layer.modules_to_save:
            found |= {f"{path}.{leaf}": whole(one) for leaf, one in layer.modules_to_save["default"].named_parameters()}
    return found


class Start(ModelCheckpoint):
    """Notes the merged weights before the first step, and keeps a checkpoint of every epoch."""

    merged = None

    def on_fit_start(self, trainer, pl_module):
        self.merged = merged(pl_module.model)


def fit(models, output, *adapters, callback=True, epochs=2, resume=None, policy=None, export=("vector",), **options):
    lata = LATACallback(
        models / "instruction", output_dir=output / "lata", every_n_train_steps=3, weighting="none", export=export, table=False
    )
    checkpoint = Start(output / "kept", save_top_k=-1, filename="{epoch}")
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)
    callbacks = [lata, checkpoint] if callback else [checkpoint]
    run = trainer(output, *callbacks, strategy=strategy, devices=2, max_epochs=epochs, enable_checkpointing=True, **options)
    module = Adapted(models / "instruct", adapters or [PLAIN], policy)
    run.fit(module, batches(8), batches(2), ckpt_path=resume)
    tuned = merged(module.model)
    if run.is_global_zero:
        save_file(tuned, output / "tuned.safetensors")
        save_file(checkpoint.merged, output / "start.safetensors")


def resumed(models, output):
    fit(models, output, epochs=1)
    fit(models, output, resume=output / "kept/epoch=0.ckpt")


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    models, output = map(Path, sys.argv[1:])
    saved = {**PLAIN, "modules_to_save": ["lm_head"]}
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    cases = {
        "plain": lambda to: fit(models, to),
        "without": lambda to: fit(models, to, callback=False),
        "resumed": lambda to: resumed(models, to),
        "peft": lambda to: fit(models, to, export=("vector", "peft"), policy=half),
        "saved": lambda to: fit(models, to, saved),
        "pissa": lambda to: fit(models, to, {**PLAIN, "init_lora_weights": "pissa"}),
        "several": lambda to: fit(models, to, PLAIN, {"r": 3, "lora_alpha": 9, "target_modules": ["q_proj", "gate_proj"]}),
    }
    for name, run in cases.items():
        (output / name).mkdir(exist_ok=True)
        run(output / name)
    leave_together()
