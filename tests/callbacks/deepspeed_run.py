"""Fits under DeepSpeed on two CPU processes, started by a test: python deepspeed_run.py MODELS OUTPUT

Every case leaves a directory below OUTPUT, with the start and the tuned weights as DeepSpeed's own function gathers its float32 masters.
"""

import logging
import sys
from pathlib import Path

import deepspeed
import lightning.pytorch as pl
import peft
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from lightning_models import Module, batches, leave_together, trainer
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from lata_lightning import LATACallback, LataError


class OnCPU(DeepSpeedStrategy):
    """Lightning asks for GPUs, and DeepSpeed for a device with a number."""

    def setup_environment(self):
        DDPStrategy.setup_environment(self)

    def setup_distributed(self):
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self):
        return torch.device("cpu", 0)


class Partitioned(Module):
    def __init__(self, start, build=None, learning_rate=0.05):
        model = LlamaForCausalLM.from_pretrained(start).train()
        super().__init__(model if build is None else build(model), learning_rate)

    def validation_step(self, batch, batch_idx):
        return self.model(input_ids=batch, labels=batch).loss


def whole(parameter):
    if parameter.requires_grad:
        return safe_get_full_fp32_param(parameter).detach().clone()
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().float().clone()


class Masters(pl.Callback):
    """Gathers the masters before the first step and after the last one."""

    def values(self, module):
        return {name: whole(parameter) for name, parameter in module.model.named_parameters()}

    def on_train_start(self, trainer, pl_module):
        self.start = self.values(pl_module)

    def on_train_end(self, trainer, pl_module):
        self.tuned = self.values(pl_module)


def fit(
    models,
    output,
    stage,
    precision="bf16-mixed",
    *,
    callback=True,
    build=None,
    epochs=2,
    resume=None,
    rate=0.05,
    provider="auto",
    **options,
):
    strategy = OnCPU(stage=stage, allgather_bucket_size=2000, reduce_bucket_size=2000, logging_level=logging.ERROR, **options)
    strategy.config["zero_optimization"].update(stage3_param_persistence_threshold=300)
    strategy.config["zero_force_ds_cpu_optimizer"] = False
    # DeepSpeed takes no processor for able to compute in float16, which torch does on each.
    get_accelerator().is_fp16_supported = lambda: True
    lata = LATACallback(models / "instruction", output_dir=output / "lata", every_n_train_steps=3, base_weights=provider, table=False)
    masters, checkpoint = Masters(), ModelCheckpoint(output / "kept", save_top_k=-1, filename="{epoch}")
    run = trainer(
        output,
        *([lata, masters, checkpoint] if callback else [masters]),
        strategy=strategy,
        devices=2,
        max_epochs=epochs,
        precision=precision,
        enable_checkpointing=callback,
    )
    run.fit(Partitioned(models / "instruct", build, rate), batches(8), batches(2), ckpt_path=resume)
    if run.is_global_zero:
        output.mkdir(exist_ok=True)
        save_file(masters.start, output / "start.safetensors")
        save_file(masters.tuned, output / "tuned.safetensors")


def resumed(models, output, stage):
    fit(models, output, stage, epochs=1)
    fit(models, output, stage, resume=output / "kept/epoch=0.ckpt")


def frozen(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" not in name)
    return model


def adapted(model):
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "up_proj"]))


def refusal(models, output, **options):
    try:
        fit(models, output, 0, **options)
    except LataError as error:
        (output / f"refused-{torch.distributed.get_rank()}").write_text(str(error))


CASES = {
    "1": lambda models, to: fit(models, to, 1),
    "2": lambda models, to: fit(models, to, 2),
    "3": lambda models, to: fit(models, to, 3),
    "2-without": lambda models, to: fit(models, to, 2, callback=False),
    "3-without": lambda models, to: fit(models, to, 3, callback=False),
    # So small a rate that most steps do not show in bfloat16.
    "2-coarse": lambda models, to: fit(models, to, 2, rate=1e-5),
    "3-coarse": lambda models, to: fit(models, to, 3, rate=1e-5),
    "2-fp32": lambda models, to: fit(models, to, 2, "32-true"),
    "3-fp32": lambda models, to: fit(models, to, 3, "32-true", provider="memory"),
    "2-fp16": lambda models, to: fit(models, to, 2, "16-mixed", rate=1e-3),
    "3-fp16": lambda models, to: fit(models, to, 3, "16-mixed", rate=1e-3),
    "2-frozen": lambda models, to: fit(models, to, 2, build=frozen),
    "3-frozen": lambda models, to: fit(models, to, 3, build=frozen),
    "2-offload": lambda models, to: fit(models, to, 2, offload_optimizer=True),
    "3-offload": lambda models, to: fit(models, to, 3, offload_optimizer=True, offload_parameters=True),
    "2-lora": lambda models, to: fit(models, to, 2, build=adapted),
    "3-lora": lambda models, to: fit(models, to, 3, build=adapted),
    "2-resumed": lambda models, to: resumed(models, to, 2),
    "3-resumed": lambda models, to: resumed(models, to, 3),
    "hidden": lambda models, to: refusal(models, to, precision="16-mixed"),
}

if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    models, output = map(Path, sys.argv[1:3])
    for name in sys.argv[3:] or CASES:
        (output / name).mkdir(exist_ok=True)
        CASES[name](models, output / name)
    leave_together()
