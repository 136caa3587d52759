"""Models of LitGPT. LitGPT pins other versions of torch, lightning and numpy, so these are small modules with its names and classes, not LitGPT itself."""

import sys
from types import ModuleType

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lata_lightning import LATACallback, LataError, TaskVector, TaskVectorMonitor, Term, merge
from lata_lightning.live.live_model import find_model

WIDTH, HEAD, HEADS, GROUPS = 8, 2, 4, 2


class GPT(nn.Module):
    """The names of LitGPT: ``lm_head``, ``transformer.wte``, ``transformer.h.0.attn.qkv``."""

    def __init__(self, linear=nn.Linear, fused=nn.Linear):
        super().__init__()
        torch.manual_seed(0)
        out = HEAD * (HEADS + 2 * GROUPS)
        block = lambda: nn.ModuleDict(  # noqa: E731
            {
                "norm_1": nn.LayerNorm(WIDTH),
                "attn": nn.ModuleDict({"qkv": fused(WIDTH, out), "proj": linear(HEAD * HEADS, WIDTH)}),
                "norm_2": nn.LayerNorm(WIDTH),
                "mlp": nn.ModuleDict({"fc": linear(WIDTH, 16), "proj": linear(16, WIDTH)}),
            }
        )
        self.transformer = nn.ModuleDict(
            {"wte": nn.Embedding(12, WIDTH), "h": nn.ModuleList(block() for _ in range(2)), "ln_f": nn.LayerNorm(WIDTH)}
        )
        self.lm_head = linear(WIDTH, 12)

    def forward(self, tokens):
        values = self.transformer.wte(tokens)
        for block in self.transformer.h:
            values = values + block.attn.proj(block.attn.qkv(block.norm_1(values))[..., : HEAD * HEADS])
            values = values + block.mlp.proj(torch.relu(block.mlp.fc(block.norm_2(values))))
        return self.lm_head(self.transformer.ln_f(values))


class LoRALayer(nn.Module):
    def __init__(self, rank, alpha):
        super().__init__()
        self.r, self.merged = rank, False
        self.scaling = alpha / rank if rank else 0.0


class LoRALinear(LoRALayer):
    def __init__(self, inputs, outputs, rank=2, alpha=3):
        super().__init__(rank, alpha)
        self.linear = nn.Linear(inputs, outputs)
        if rank:
            self.lora_A, self.lora_B = nn.Parameter(torch.randn(rank, inputs)), nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, values):
        return self.linear(values) + (values @ self.lora_A.T @ self.lora_B.T * self.scaling if self.r else 0)


class LoRAQKVLinear(LoRALinear):
    """Queries, keys and values in one matrix: interleaved by group, and those without an adapter padded with zeros."""

    def __init__(self, inputs, outputs, enabled=(True, False, True), rank=2, alpha=3):
        super().__init__(inputs, outputs, 0)
        self.r, self.scaling, self.enabled = rank, alpha / rank, enabled
        lengths = (HEAD * HEADS, HEAD * GROUPS, HEAD * GROUPS)
        self.qkv_shapes = [length for length, on in zip(lengths, enabled, strict=True) if on]
        self.lora_A = nn.Parameter(torch.randn(rank * sum(enabled), inputs))
        self.lora_B = nn.Parameter(torch.zeros(sum(self.qkv_shapes), rank))

    def zero_pad(self, values):
        if all(self.enabled):
            return values
        per_group = HEADS // GROUPS + 2
        kinds = [min((row // HEAD) % per_group - (per_group - 3), 2) for row in range(self.linear.out_features)]
        kinds = [max(kind, 0) for kind in kinds]
        order = [row for kind, on in enumerate(self.enabled) if on for row in range(len(kinds)) if kinds[row] == kind]
        padded = values.new_zeros(*values.shape[:-1], self.linear.out_features)
        padded[..., order] = values
        return padded

    def forward(self, values):
        between = (values @ self.lora_A.T).chunk(len(self.qkv_shapes), dim=-1)
        parts = [part @ weight.T for part, weight in zip(between, self.lora_B.split(self.qkv_shapes), strict=True)]
        return self.linear(values) + self.zero_pad(torch.cat(parts, dim=-1)) * self.scaling


@pytest.fixture(autouse=True)
def _litgpt(monkeypatch):
    """The modules in which LitGPT has these classes."""
    model, lora = ModuleType("litgpt.model"), ModuleType("litgpt.lora")
    model.GPT, lora.LoRALayer, lora.LoRALinear, lora.LoRAQKVLinear = GPT, LoRALayer, LoRALinear, LoRAQKVLinear
    monkeypatch.setitem(sys.modules, "litgpt.model", model)
    monkeypatch.setitem(sys.modules, "litgpt.lora", lora)


class Lit(pl.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self):
        return torch.optim.AdamW([parameter for parameter in self.parameters() if parameter.requires_grad], lr=0.05)


def adapted(enabled=(True, False, True)):
    model = GPT(LoRALinear, lambda inputs, outputs: LoRAQKVLinear(inputs, outputs, enabled))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


def train(model, steps=3):
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.05)
    for step in range(steps):
        tokens = torch.randint(12, (2, 6), generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def effect(layer):
    """What a layer adds to its base weight, from what it makes of the unit vectors, in float64."""
    doubled = layer.double()
    identity = torch.eye(doubled.linear.in_features, dtype=torch.float64)
    return (doubled(identity) - doubled.linear(identity)).detach().T


@pytest.mark.parametrize("enabled", [(True, False, True), (True, True, True), (False, False, True)])
def test_factors_of_fused_projections_are_what_the_layers_do(tmp_path, enabled):
    model = adapted(enabled)
    monitor = TaskVectorMonitor(model)
    train(model)
    monitor.measure(3)
    monitor.save(tmp_path / "vector")
    norm = monitor.history[-1].figures["task_norm"]
    vector = TaskVector.open(tmp_path / "vector")
    expected = {f"{path}.weight": effect(layer) for path, layer in model.named_modules() if isinstance(layer, LoRALinear)}
    assert {name for name in vector if name not in vector.unchanged} == set(expected)
    for name, value in expected.items():
        assert value.any()
        torch.testing.assert_close(vector[name].double(), value, rtol=1e-6, atol=1e-8)
    assert norm == pytest.approx(torch.cat([value.flatten() for value in expected.values()]).norm().item(), rel=1e-6)


def test_names_are_those_of_the_checkpoint_without_adapters():
    monitor = TaskVectorMonitor(adapted())
    assert set(monitor.tracker.live.names) == set(GPT().state_dict())
    assert monitor.tracker.positions.blocks == ("transformer.h.0", "transformer.h.1")


def test_a_layer_of_rank_zero_is_a_plain_layer():
    model = GPT(LoRALinear, nn.Linear)
    model.lm_head = LoRALinear(WIDTH, 12, 0)
    monitor = TaskVectorMonitor(model)
    assert "lm_head.weight" not in monitor.tracker.live.adapted
    assert set(monitor.tracker.live.names) == set(GPT().state_dict())


def test_merged_adapters_are_refused():
    model = adapted()
    model.lm_head.merged = True
    with pytest.raises(LataError, match=r"LitGPT has merged them into 1: \['lm_head.weight'\]"):
        TaskVectorMonitor(model)


@pytest.mark.filterwarnings("ignore:.*isinstance\\(treespec, LeafSpec\\)", "ignore:.*does not have many workers")
@pytest.mark.parametrize("lora", [False, True])
def test_the_gpt_in_a_lightning_module_is_found_and_its_checkpoint_is_read_and_merged_onto(tmp_path, lora):
    torch.save(GPT().state_dict(), tmp_path / "lit_model.pth")
    model = adapted() if lora else GPT()
    module = Lit(model)
    assert find_model(module) is model
    callback = LATACallback(output_dir=tmp_path / "run", base_weights="auto" if lora else str(tmp_path / "lit_model.pth"), table=False)
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[callback], log_every_n_steps=1, default_root_dir=tmp_path,
    )  # fmt: skip
    if lora:
        # The base weights of the adapted model are those of the checkpoint.
        state = torch.load(tmp_path / "lit_model.pth", weights_only=True)
        for path, layer in model.named_modules():
            if isinstance(layer, LoRALinear):
                layer.linear.weight.data.copy_(state[f"{path}.weight"])
                layer.linear.bias.data.copy_(state[f"{path}.bias"])
    trainer.fit(module, torch.utils.data.DataLoader(torch.randint(12, (4, 6)), batch_size=2))
    vector = TaskVector.open(tmp_path / "run/task_vector")
    start = torch.load(tmp_path / "lit_model.pth", weights_only=True)
    assert set(vector) == set(start)
    merge(tmp_path / "lit_model.pth", [Term(vector.unweighted())], tmp_path / "merged")
    merged = load_file(tmp_path / "merged/model.safetensors")
    if lora:
        expected = {
            f"{path}.weight": start[f"{path}.weight"] + effect(layer)
            for path, layer in model.named_modules()
            if isinstance(layer, LoRALinear)
        }
    else:
        expected = model.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(merged[name].double(), value.double(), rtol=1e-6, atol=1e-7)
