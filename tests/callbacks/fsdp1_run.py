"""Fits under FSDP1 on two processes, started by a test: python fsdp1_run.py MODELS TIED OUTPUT

MODELS and TIED hold the same models without and with tied embeddings. Every case leaves a directory below OUTPUT.
"""

import functools
import logging
import sys
from pathlib import Path

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy
from lightning_models import Module, batches, leave_together, trainer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lata_lightning import LATACallback, LataError
from lata_lightning.layers import unwrapped


class OnCPU(FSDPStrategy):
    """Lightning asks for GPUs only where the class is FSDPStrategy itself; torch has to be told that the device is the CPU."""

    mesh = None

    def setup_environment(self):
        super().setup_environment()
        if self.mesh is not None:
            self.kwargs["device_mesh"] = init_device_mesh("cpu", self.mesh)

    def _setup_model(self, model):
        return FullyShardedDataParallel(
            module=model,
            cpu_offload=self.cpu_offload,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=torch.device("cpu"),
            **self.kwargs,
        )


class Flat(Module):
    def __init__(self, start, build=None):
        super().__init__(None)
        self.start, self.build = start, build

    def configure_model(self):
        if self.model is None:
            model = LlamaForCausalLM.from_pretrained(self.start).train()
            self.model = model if self.build is None else self.build(model)

    def configure_optimizers(self):
        return torch.optim.AdamW([one for one in self.trainer.model.parameters() if one.requires_grad], lr=self.learning_rate)

    def validation_step(self, batch, batch_idx):
        return self.model(input_ids=batch, labels=batch).loss


def freeze(model):
    model.model.embed_tokens.requires_grad_(False)
    return model


def compiled(model):
    return torch.compile(model, backend="eager")


def adapted(model):
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))


def fit(models, output, *, callback=True, build=None, mesh=None, epochs=2, resume=None, precision="32-true", provider="auto", **options):
    wrap = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
    strategy = OnCPU(**{"auto_wrap_policy": wrap, "state_dict_type": "sharded", **options})
    strategy.mesh = mesh
    lata = LATACallback(models / "instruction", output_dir=output / "lata", every_n_train_steps=3, base_weights=provider, table=False)
    checkpoint = ModelCheckpoint(output / "kept", save_top_k=-1, filename="{epoch}")
    run = trainer(
        output,
        *([lata, checkpoint] if callback else []),
        strategy=strategy,
        devices=2,
        max_epochs=epochs,
        precision=precision,
        enable_checkpointing=callback,
    )
    module = Flat(models / "instruct", build)
    run.fit(module, batches(8), batches(2), ckpt_path=resume)
    with FullyShardedDataParallel.summon_full_params(run.strategy.model, writeback=False):
        named = {unwrapped(name).removeprefix("model."): one.detach().clone() for name, one in run.strategy.model.named_parameters()}
    if run.is_global_zero:
        # Two prefixes: that of the module, and that of the model in it, which a model without a head lacks.
        whole = {name if name.startswith(("model.", "lm_head")) else f"model.{name}": one for name, one in named.items()}
        output.mkdir(exist_ok=True)
        torch.save({"state_dict": whole}, output / "tuned.ckpt")


def resumed(models, output, provider):
    fit(models, output, epochs=1, provider=provider)
    fit(models, output, provider=provider, resume=output / "kept/epoch=0.ckpt")


def refusal(models, output, **options):
    try:
        fit(models, output, **options)
    except LataError as error:
        (output / f"refused-{torch.distributed.get_rank()}").write_text(str(error))


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    models, tied, output = map(Path, sys.argv[1:])
    cases = {
        "original": lambda to: fit(models, to, use_orig_params=True),
        "without": lambda to: fit(models, to, use_orig_params=True, callback=False),
        "flat": lambda to: fit(tied, to, use_orig_params=False),
        "gradients": lambda to: fit(tied, to, use_orig_params=True, sharding_strategy="SHARD_GRAD_OP", precision="bf16-mixed"),
        "replicas": lambda to: fit(models, to, use_orig_params=False, sharding_strategy="NO_SHARD", provider="memory"),
        "hybrid": lambda to: fit(models, to, sharding_strategy="HYBRID_SHARD", mesh=(1, 2), build=compiled),
        "frozen": lambda to: fit(models, to, use_orig_params=True, build=freeze, activation_checkpointing_policy={LlamaDecoderLayer}),
        "resumed": lambda to: resumed(models, to, "auto"),
        "spilled": lambda to: resumed(models, to, "spill"),
        "adapted": lambda to: refusal(models, to, use_orig_params=True, build=adapted),
    }
    for name, run in cases.items():
        (output / name).mkdir(exist_ok=True)
        run(output / name)
    leave_together()
