"""Fine-tuning of nothing but the attention projections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from lata_lightning.callbacks.lata import LATACallback
from lata_lightning.errors import LataError, first_three
from lata_lightning.layers import unwrapped
from lata_lightning.live.adapters import look_at
from lata_lightning.live.live_model import find_model
from lata_lightning.live.new_heads import is_classifier, new_head
from lata_lightning.live.projections import attention_projections
from lata_lightning.store.lora import peft_kinds
from lata_lightning.store.names import LeaveOut

STATE_VERSION = 1


class AttentionOnlyFinetuning(pl.Callback):
    """Train the weight matrices of the attention projections, Wq Wk Wv Wo, and nothing else.

    Everything else in the LightningModule is frozen: MLPs, norms with their running statistics, embeddings, biases, heads. For what counts as a
    projection see ``attention_projections``. The model is frozen as soon as it is there (in ``setup``, and after the module's own ``setup``
    and ``configure_model``), so before a strategy wraps it and before ``configure_optimizers``. An optimizer over all parameters works as well: what is
    frozen has no gradient, and without one no optimizer of torch moves a parameter, by weight decay or otherwise. DDP needs no ``find_unused_parameters``.

    Args:
        train_bias: Train the biases of the projections, too.
        model: Path of the model inside the LightningModule; by default the transformers model in it, else the whole module. Attention elsewhere
            is frozen.
        heads: Paths of heads inside the LightningModule that are trained, too: modules that belong to one task, such as a freshly
            initialised classifier. They take no part in the task vector: a LATACallback beside this one leaves out by itself what the start does not
            have; otherwise it must follow a model that does not contain them, ``LATACallback(model="model.vit")`` for a head at
            ``model.classifier``, or leave them out, ``LATACallback(leave_out=["classifier"])``. A new head that stays frozen causes a warning.

    Checkpoint state, which loads with ``weights_only=True``, some 50 bytes per trained tensor:

    =============== =====================================================================================================
    key             value
    =============== =====================================================================================================
    ``version``     1
    ``trainable``   names of the trained tensors in the LightningModule; a resumed run must train the same
    =============== =====================================================================================================

    Nothing is logged. Works on one device, under DDP and under FSDP2 (``ModelParallelStrategy``), before or after LATACallback in the list of callbacks.

    Raises:
        LataError: The model has no attention; a head does not exist, contains attention projections, shares parameters with the rest, or lies in the
            model a LATACallback follows; adapters or quantised weights; a resumed run that trained other tensors.

    Source: arXiv:2407.07089, where ``train_bias=False`` is the method and ``True`` an ablation.
    """

    def __init__(self, train_bias: bool = False, *, model: str | None = None, heads: Sequence[str] = ()) -> None:
        if isinstance(heads, str):
            raise LataError(f"heads must be a sequence of paths, got the text {heads!r}; write [{heads!r}]")
        self.train_bias, self.model, self.heads = train_bias, model, tuple(heads)
        self._trainable: tuple[str, ...] = ()
        self._fitting = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Freeze what is there now, and again what the module's own hooks build."""
        self._fitting, self._trainable = stage == "fit", ()
        if self._fitting:
            self._try_to_freeze(pl_module)
            for hook in ("setup", "configure_model"):
                _after(pl_module, hook, lambda: self._try_to_freeze(pl_module))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log which parameters are trained, now that the model is complete; refuse a model in which none are."""
        self._freeze(pl_module)
        self._check_companions(trainer, pl_module)
        parameters = dict(pl_module.named_parameters())
        trained = sum(parameter.numel() for parameter in parameters.values() if parameter.requires_grad)
        total = sum(parameter.numel() for parameter in parameters.values())
        self._warn_of_untrained_head(pl_module)
        heads = f" (with {', '.join(self.heads)})" if self.heads else ""
        rank_zero_info(
            f"AttentionOnlyFinetuning: {trained:,} parameters in {len(self._trainable)} tensors{heads} are trained, of {total:,} in {len(parameters)}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Version, and the names of the trained tensors."""
        return {"version": STATE_VERSION, "trainable": list(self._trainable)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to go on with other tensors than those the resumed run has trained."""
        version = state_dict["version"]
        if version > STATE_VERSION:
            raise LataError(
                f"the checkpoint's AttentionOnlyFinetuning state is of version {version}, this release reads up to {STATE_VERSION}. Upgrade it."
            )
        differing = set(state_dict["trainable"]) ^ set(self._trainable)
        # Where nothing could be frozen yet, on_fit_start says why.
        if self._fitting and self._trainable and differing:
            raise LataError(
                f"a resumed run must train the same tensors as before; trained only before or only now are {first_three(differing)}. Give train_bias, "
                "model and heads as they were, or start a new run from the weights."
            )

    def _try_to_freeze(self, pl_module: pl.LightningModule) -> None:
        try:
            self._freeze(pl_module)
        except LataError:
            # The model, or a part of it, may not be built yet; what is still wrong in on_fit_start is an error there.
            return

    def _freeze(self, pl_module: pl.LightningModule) -> None:
        """Leave only projections and heads trainable; nothing changes where that is impossible."""
        root = find_model(pl_module, self.model)
        if isinstance(root, peft_kinds()):
            raise LataError(
                "AttentionOnlyFinetuning trains a model's own weights, and this one is wrapped by peft; name the projections in the adapter's "
                "target_modules instead"
            )
        projections = attention_projections(root, train_bias=self.train_bias)
        if not projections:
            raise LataError(
                f"{type(root).__name__} has no attention projections to train. Say where the model is with model=…, or train without "
                "AttentionOnlyFinetuning."
            )
        packed = [name for name, parameter in projections.items() if not parameter.is_floating_point()]
        if packed:
            raise LataError(f"attention projections must be floating numbers to be trained; quantised are {first_three(packed)}")
        trained = {id(parameter) for parameter in projections.values()}
        heads = [_head(pl_module, name, trained) for name in self.heads]
        inside = {id(part) for head in heads for part in head.modules()}
        trained |= {id(parameter) for head in heads for parameter in head.parameters()}
        for parameter in pl_module.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        for part in pl_module.modules():
            if isinstance(part, _NormBase) and id(part) not in inside:
                # In training mode the running statistics follow the data, without any gradient.
                part.eval()
        named = pl_module.named_parameters()
        self._trainable = tuple(unwrapped(name) for name, parameter in named if parameter.requires_grad)

    def _warn_of_untrained_head(self, pl_module: pl.LightningModule) -> None:
        """Warn where a head that starts at random values is frozen: the model would learn around random numbers."""
        if not is_classifier(find_model(pl_module, self.model)):
            return
        live = look_at(pl_module, self.model)
        new = new_head(live)
        path = next((unwrapped(name) for name, module in pl_module.named_modules() if module is live.module), "")
        own = {unwrapped(name): parameter for name, parameter in live.module.named_parameters()}
        frozen = [name for name in new.names if name in own and not own[name].requires_grad]
        if frozen:
            heads = [f"{path}.{module}".removeprefix(".") for module in new.modules(own)]
            rank_zero_warn(
                f"the head is new, so its numbers are random, and it is frozen: {first_three(frozen)}. Train it too: AttentionOnlyFinetuning(heads="
                f"{heads!r}), or start from a model whose head is trained."
            )

    def _check_companions(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A head has a meaning for its own task only, so no task vector may contain it."""
        headed = {id(parameter) for name in self.heads for parameter in pl_module.get_submodule(name).parameters()}
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, LATACallback):
                new = new_head(look_at(pl_module, other.model, LeaveOut(other.leave_out)))
                left_out = LeaveOut(other.leave_out, new.names)
                followed = find_model(pl_module, other.model).named_parameters()
                inside = [name for name, parameter in followed if id(parameter) in headed and not left_out(unwrapped(name))]
                if inside:
                    raise LataError(
                        f"a trained head must not be part of the task vector, and LATACallback follows a model that contains {first_three(inside)}. "
                        "Give LATACallback the path of the encoder with model=…, or leave the head out with leave_out=…"
                    )


def _after(module: pl.LightningModule, hook: str, then: Callable[[], object]) -> None:
    """Do something right after a hook of the module, once: between building a model and wrapping it, Lightning calls no callback."""
    original = getattr(module, hook)

    @wraps(original)
    def hooked(*args: Any, **keywords: Any) -> None:
        delattr(module, hook)
        original(*args, **keywords)
        then()

    setattr(module, hook, hooked)


def _head(pl_module: pl.LightningModule, name: str, projections: set[int]) -> nn.Module:
    """The head under a path; an error if it is no part of its own."""
    try:
        head = pl_module.get_submodule(name)
    except AttributeError as error:
        raise LataError(
            f"the LightningModule has no head {name!r}; its modules are {first_three(path for path, _ in pl_module.named_modules() if path)}"
        ) from error
    own = {id(parameter) for parameter in head.parameters()}
    if not own:
        raise LataError(f"the head {name!r} has no parameters to train; leave it out")
    if own & projections:
        raise LataError(f"the head {name!r} contains attention projections of the model; give the path of the head alone")
    everything = pl_module.named_parameters(remove_duplicate=False)
    shared = [path for path, parameter in everything if id(parameter) in own and not path.startswith(f"{name}.")]
    if shared:
        raise LataError(
            f"the head {name!r} is tied to {first_three(shared)}, which would be trained with it; untie it first, or leave it frozen"
        )
    return head
