from copy import deepcopy

import peft
import pytest
import small_modules
import torch
from small_modules import Stack, exported, follow, train
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import LlamaConfig, LlamaForCausalLM

from lata_lightning import LataError, TaskVector
from lata_lightning.live.adapters import LoraModel, look_at
from lata_lightning.live.live_model import LiveModel, find_model
from lata_lightning.live.placements.mesh import MeshStrategy
from lata_lightning.live.placements.region import Region
from lata_lightning.store.names import LeaveOut
from lata_lightning.store.tied_names import ties_of

pytestmark = [
    # torch warns of its own use of torch.jit when it imports its compiler.
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
    # peft asks a model of transformers for an attribute by its older name.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]


class Overridden(Stack):
    """Overrides state_dict without arguments, as for a checkpoint that leaves a frozen part out."""

    def state_dict(self):
        return {}


def test_a_module_that_overrides_state_dict_without_arguments_is_read_whole():
    module = Overridden()
    module.register_buffer("scratch", torch.zeros(2), persistent=False)
    plain = Stack()
    floating = {name for name, tensor in plain.state_dict().items() if tensor.is_floating_point()}
    assert set(LiveModel(module).names) == floating
    assert set(TaskVector.between(plain, module)) >= {name for name, _ in plain.named_parameters()}


class Part(torch.nn.Linear):
    """A part with methods of its own, none of which takes the arguments of the methods it overrides."""

    def state_dict(self):
        return {}

    def parameters(self):
        return iter([self.weight])

    def named_parameters(self):
        return iter([("weight", self.weight)])

    def named_buffers(self):
        return iter([])

    def buffers(self):
        return iter([])


class Whole(Part):
    """The same around two tied parts."""

    def __init__(self):
        super().__init__(4, 4)
        self.part, self.twin = Part(4, 4), Part(4, 4)
        self.part.register_buffer("level", torch.ones(3))
        self.twin.weight = self.part.weight


def test_methods_that_parts_override_without_arguments_hide_no_tensor():
    names = {"weight", "bias", "part.weight", "part.bias", "part.level", "twin.bias"}
    module = Whole()
    assert set(LiveModel(module).names) == names
    assert ties_of(module, names) == (("part.weight", "twin.weight"),)
    other = deepcopy(module)
    with torch.no_grad():
        other.part.weight.add_(1)
    vector = TaskVector.between(module, other)
    assert {name for name in names if name in set(vector) and vector[name].any()} == {"part.weight"}
    tracker, _ = follow(module)
    with torch.no_grad():
        module.part.weight.add_(1)
    deltas, still = exported(tracker)
    assert {name for name in set(deltas) - still if deltas[name].any()} == {"part.weight"}


def test_ties_are_recorded_without_what_compiling_adds_to_names():
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    module[1].weight = module[0].weight
    module[0] = torch.compile(module[0])
    assert ties_of(module, {"0.weight"}) == (("0.weight", "1.weight"),)


def test_lazy_layers_are_no_weights_before_they_have_a_shape():
    module = torch.nn.Sequential(torch.nn.LazyLinear(3), torch.nn.Linear(3, 3))
    assert not LiveModel(module).materialized
    with pytest.raises(LataError, match="run lazy layers once there"):
        follow(module)
    module(torch.zeros(1, 4))
    assert LiveModel(module).shape("0.weight") == (3, 4)


@pytest.mark.parametrize(
    ("values", "dtype", "advice"),
    [
        (torch.ones(2, dtype=torch.complex64), "complex64", "view_as_real"),
        (torch.arange(3), "int64", "should be buffers"),
        (torch.zeros(4, dtype=torch.uint8), "uint8", "If the model is quantised"),
    ],
)
def test_parameters_that_are_no_floating_numbers_are_named_with_their_dtype_or_left_out(values, dtype, advice):
    module = Stack()
    module.odd = torch.nn.Parameter(values, requires_grad=False)
    with pytest.raises(LataError, match=rf"odd \({dtype}\).*{advice}"):
        LiveModel(module)
    assert "odd" not in LiveModel(module, LeaveOut(["^odd$"])).names


def compiled(module):
    module.layers[0] = torch.compile(module.layers[0])
    module.layers[1].attention = torch.compile(module.layers[1].attention)


def rematerialised(module):
    for index, layer in enumerate(module.layers):
        module.layers[index] = checkpoint_wrapper(layer)


def both(module):
    for index, layer in enumerate(module.layers):
        module.layers[index] = torch.compile(checkpoint_wrapper(layer))


def everything(module):
    module.layers = torch.compile(module.layers)


WRAPPED = [compiled, rematerialised, both, everything]


@pytest.mark.parametrize("wrap", WRAPPED)
def test_wrappers_change_neither_names_nor_layers(wrap):
    plain, wrapped = Stack(), Stack()
    wrap(wrapped)
    one, other = (follow(module)[0] for module in (plain, wrapped))
    assert one.live.names == other.live.names
    assert one.positions == other.positions
    assert one.positions.blocks == ("layers.0", "layers.1")


def test_a_wrapped_model_in_training_gives_the_vector_of_the_plain_one():
    vectors = []
    for wrap in (lambda module: None, rematerialised):
        module = Stack()
        wrap(module)
        tracker, _ = follow(module)
        train(module)
        vectors.append(exported(tracker)[0])
    assert vectors[0].keys() == vectors[1].keys()
    # Forward passes run twice under activation checkpointing, so running statistics see the data twice.
    assert all(torch.equal(vectors[0][name], vectors[1][name]) for name in vectors[0] if ".running_" not in name)


def tiny_llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=16, bos_token_id=1, eos_token_id=2))


@pytest.mark.parametrize("wrap", [torch.compile, checkpoint_wrapper])
def test_adapters_in_wrapped_blocks_have_the_names_of_the_plain_model(wrap):
    names = []
    for wrapped in (False, True):
        model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
        layers = model.base_model.model.model.layers
        for index in range(2 if wrapped else 0):
            layers[index] = wrap(layers[index])
        live = look_at(torch.nn.ModuleDict({"model": model}))
        names.append((live.names, live.adapted))
    assert names[0] == names[1]


@pytest.mark.parametrize("wrap", [torch.compile, checkpoint_wrapper, lambda module: torch.compile(checkpoint_wrapper(module))])
@pytest.mark.parametrize("path", [None, "model"])
def test_a_wrapped_model_in_an_attribute_is_found_inside_its_wrapper(wrap, path):
    model = tiny_llama()
    assert find_model(torch.nn.ModuleDict({"model": wrap(model)}), path) is model


def test_two_models_are_refused_with_the_argument_that_names_one():
    root = torch.nn.ModuleDict({"actor": tiny_llama(), "reference": torch.compile(tiny_llama())})
    with pytest.raises(LataError, match=r"2: \['actor', 'reference'\]; say which one is meant, such as model='actor'"):
        find_model(root)


class Spread(MeshStrategy):
    """Says of every parameter that other processes may have other parts of it."""

    def of(self, parameter):
        return small_modules.Part(parameter, Region.whole(tuple(parameter.shape)))


def test_quantised_weights_under_adapters_are_refused_where_they_are_sharded():
    model = peft.get_peft_model(
        LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, vocab_size=16)),
        peft.LoraConfig(target_modules=["q_proj"]),
    )
    assert LoraModel(model, strategy=Spread()).adapted
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.base_layer.weight = torch.nn.Parameter(layer.base_layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(LataError, match=r"quantised ones are under the adapters of 1: \['model.layers.0.self_attn.q_proj.weight'\]"):
        LoraModel(model, strategy=Spread())
