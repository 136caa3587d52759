"""One of four processes that shard a small model in many ways, started by a test: python placements_run.py RANK DIRECTORY

Each case trains two steps and notes the three sums of every tensor as the package measures them, and as whole tensors in float64 give them. The
results go to DIRECTORY/rankN.json.
"""

import json
import sys
from copy import deepcopy
from pathlib import Path

import torch
import torch.distributed as dist
from small_modules import exported
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lata_lightning import LataError, TaskVector
from lata_lightning.live.measuring import Measurement
from lata_lightning.live.tracker import Tracker

WORLD = 4
TP = {"up": ColwiseParallel(), "down": RowwiseParallel()}
ROWWISE = {"down": RowwiseParallel(input_layouts=Replicate())}


class Block(nn.Module):
    """A block of an odd width, so that few shards are even, and one weight with fewer rows than processes."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.gain = nn.Linear(7, 12), nn.Linear(12, 7), nn.Parameter(torch.ones(3, 7))

    def forward(self, values):
        return values + self.down(self.up(values).tanh()) * self.gain.sum(0)


class Model(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(7, 5)
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, values):
        for layer in self.layers:
            values = layer(values)
        self.seen += 1
        return self.head(values)


def mesh(*sizes):
    return init_device_mesh("cpu", sizes, mesh_dim_names=("a", "b", "c")[: len(sizes)])


def shard(model, tensor_mesh=None, plan=None, data_mesh=None, **options):
    for block in model.layers:
        if plan is not None:
            parallelize_module(block, tensor_mesh, plan)
        if data_mesh is not None:
            fully_shard(block, mesh=data_mesh, **options)
    if data_mesh is not None:
        fully_shard(model, mesh=data_mesh, **options)


def frozen(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("up" not in name)
    shard(model, data_mesh=mesh(4)["a"])


def checkpointed(model):
    for number, block in enumerate(model.layers):
        model.layers[number] = checkpoint_wrapper(block)
    shard(model, mesh(2, 2)["b"], {f"_checkpoint_wrapped_module.{name}": style for name, style in TP.items()}, mesh(2, 2)["a"])


def compiled(model):
    shard(model, data_mesh=mesh(4)["a"])
    for number, block in enumerate(model.layers):
        model.layers[number] = torch.compile(block, backend="eager")


def from_meta(model):
    """Sharded without values, which are loaded part by part, as of a model that no process could hold."""
    values = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    model.to("meta")
    shard(model, data_mesh=mesh(4)["a"])
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.seen.zero_()
        for name, parameter in model.named_parameters():
            parameter.copy_(distribute_tensor(values[name], parameter.device_mesh, parameter.placements))


def one_shard(model):
    """A weight that only the last two processes have, on a mesh of their own."""
    weight = model.layers[0].gain.detach()
    pair = DeviceMesh("cpu", [2, 3])
    model.layers[0].gain = nn.Parameter(distribute_tensor(weight, pair, [Shard(0)]), requires_grad=False)


CASES = {
    "FSDP2": lambda model: shard(model, data_mesh=mesh(4)["a"]),
    "FSDP2 on a mesh of two": lambda model: shard(model, data_mesh=mesh(2, 2)["a"]),
    "FSDP2 on the other mesh of two": lambda model: shard(model, data_mesh=mesh(2, 2)["b"]),
    "HSDP": lambda model: shard(model, data_mesh=mesh(2, 2)),
    "FSDP2 in bf16": lambda model: shard(model, data_mesh=mesh(4)["a"], mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)),
    "FSDP2 with frozen layers": frozen,
    "tensor parallelism": lambda model: shard(model, mesh(4)["a"], TP),
    "tensor parallelism on a mesh of two": lambda model: shard(model, mesh(2, 2)["b"], TP),
    "row-wise parallelism and FSDP2": lambda model: shard(model, mesh(2, 2)["b"], ROWWISE, mesh(2, 2)["a"]),
    "tensor parallelism and FSDP2": lambda model: shard(model, mesh(2, 2)["b"], TP, mesh(2, 2)["a"]),
    "tensor parallelism and HSDP": lambda model: shard(model, mesh(2, 1, 2)["c"], TP, mesh(2, 1, 2)["a", "b"]),
    "activation checkpointing, tensor parallelism and FSDP2": checkpointed,
    "compiled blocks under FSDP2": compiled,
    "FSDP2 of a model built without values": from_meta,
    "a mesh without the first process": one_shard,
    "plain tensors": lambda model: None,
}


def whole(model):
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    found = {}
    for name, tensor in model.state_dict().items():
        # A process outside of the mesh of a tensor cannot ask for it.
        inside = not isinstance(tensor, DTensor) or tensor.device_mesh.get_coordinate() is not None
        if inside:
            found[plain(name)] = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
    return found


def plain(name):
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def train(model, steps=2):
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.02, foreach=False)
    for step in range(steps):
        values = torch.randn(8, 7, generator=torch.Generator().manual_seed(step))
        model(values).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def reference(live, start, base, names):
    rows = {}
    for name in names:
        # Subtracted in float32, as everywhere.
        task, direction = (live[name] - start[name]).double(), (start[name] - base[name]).double()
        rows[name] = [(task * direction).sum().item(), task.square().sum().item(), direction.square().sum().item()]
    return rows


def run(place):
    model, base = Model(), Model(1)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    place(model)
    alone = deepcopy(start)
    instruction = TaskVector.between(base, deepcopy(start), kind="instruction")
    tracker = Tracker(model)
    tracker.capture_early()
    tracker.settle(None)
    measurement = Measurement(tracker, instruction, "instruct")
    measurement.check("block", weighted=False)
    tracker.begin()
    if place is not one_shard:
        train(model)
    measured = {name: [row.inner, row.task, row.instruction] for name, row in measurement.sums().moments.items()}
    vector = exported(tracker)
    live = {**alone, **whole(model)}
    names = [plain(name) for name, _ in model.named_parameters()]
    result = {"measured": {name: measured[name] for name in names}, "expected": reference(live, start, base.state_dict(), names)}
    result["fingerprint"] = tracker.fingerprint
    if vector is not None:
        result["export"] = {name: torch.equal(vector[0][name], (live[name] - start[name]).float()) for name in vector[0]}
        result["unchanged"] = sorted(vector[1])
    return result


def local_experts(model):
    with torch.no_grad():
        model.layers[0].up.weight += dist.get_rank()


def pipeline(model):
    del model.layers[0 if dist.get_rank() < 2 else 1]
    if dist.get_rank() >= 2:
        model.layers = nn.ModuleDict({"1": model.layers[0]})


REFUSED = {"experts of each process": local_experts, "layers of each process": pipeline}


def refusal(place):
    model = Model()
    place(model)
    tracker = Tracker(model)
    try:
        tracker.settle(None)
        tracker.begin()
    except LataError as error:
        return str(error)
    return "nothing"


if __name__ == "__main__":
    rank, directory = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory / 'meeting'}", rank=rank, world_size=WORLD)
    results = {name: run(place) for name, place in CASES.items()}
    results["refused"] = {name: refusal(place) for name, place in REFUSED.items()}
    (directory / f"rank{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
