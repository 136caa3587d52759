"""An adapter that peft and the tools around it load: LoRA vectors as they are, dense ones cut down to a rank."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from math import inf, nextafter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lata_lightning.errors import CorruptFileError, LataError, first_three
from lata_lightning.exports.cards import RECONSTRUCTION, adapter_card, reconstruction
from lata_lightning.exports.factors import Factored, Truncation, common_scale, factored, rows_between, squares
from lata_lightning.exports.plan import Plan, plan_adapter
from lata_lightning.exports.remarks import loss_remark, size_remark
from lata_lightning.exports.structure import Form, Held, Structure
from lata_lightning.merging.merge import Term
from lata_lightning.merging.sum import Onto, Sum
from lata_lightning.store.dtypes import float_dtype
from lata_lightning.store.writer import Progress, ShardWriter, atomic_directory, check_free_directory, layout_size, write_json

_STEM = "adapter_model"
_PREFIX = "base_model.model."


def export_peft(
    terms: Sequence[Term],
    output: str | Path,
    *,
    onto: Onto | None = None,
    dtype: str | None = None,
    rank: int | None = None,
    energy: float | None = None,
    check_base: bool = True,
    command: str | None = None,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> Path:
    """Write Σ scale · coefficient · vector as a LoRA adapter for the start model.

    A tensor that every vector holds as factors stays in them: its lora_A comes out bit for bit, its lora_B times scale · coefficient, and several vectors
    lie side by side. A dense matrix is cut down to a rank. What is no matrix of a layer that peft can adapt, and weights that are tied, are stored
    whole (``modules_to_save``; ``bias="all"`` for biases), rounded as a merge rounds them. Tensors that do not change are left out.

    What it cost is written to ``reconstruction.json`` and to the card: ‖τ − what the adapter adds‖ / ‖τ‖ by tensor, layer and over all.

    Args:
        terms: The vectors, each with its scale.
        output: A directory that does not exist yet; it appears complete or not at all.
        onto: The start model, where it is not at the location that the first vector records. It must have a config.
        dtype: Of everything in the adapter; by default factors are float32, and whole weights have the dtype of the start.
        rank: Singular values to keep of each dense matrix; 16 if no energy is given either.
        energy: Share of ‖τ‖² to keep of each dense matrix, in (0, 1].
        check_base: Refuse a start that is known to be another than the one a vector comes from; the start is read once for it.
        command: Recorded in the card.
        progress: Called after each tensor that is written.
        note: Called with a sentence, before anything is written, if the adapter is large beside the model; and with one if it loses more than a
            tenth of the norm.

    Returns:
        The output directory. In memory are one dense tensor at a time and the factors of the adapter.

    Raises:
        BaseMismatchError: The start is another than the one a vector comes from.
        LayoutMismatchError: A vector does not hold the tensors of the start.
        LataError: An option is out of range; the modules of the start are not known; nothing changes that an adapter can hold.
        OutputError: The output exists, or the disk is full.
        CorruptFileError: Weights are not finite, or do not fit the dtype.

    Source: LoRA, arXiv:2106.09685.
    """
    target = Path(output)
    check_free_directory(target)
    truncation = Truncation(rank, energy)
    lower = None if dtype is None else float_dtype(dtype)
    total = Sum(terms, onto, check_base=check_base)
    structure = Structure(total.source)
    plan = plan_adapter(total, structure)
    adapter = _Adapter(total, structure, plan, truncation, lower)
    if check_base:
        total.check_start()
    layout = adapter.layout()
    size = layout_size(layout)
    _tell(note, adapter.size_remark(size))
    with atomic_directory(target, size) as directory:
        with ShardWriter(directory, _STEM, layout, max_shard_bytes=size + 1, metadata={"format": "pt"}) as writer:
            for key in writer.order:
                writer.write(key, adapter.value(key))
                if progress is not None:
                    progress(writer.written, size)
        write_json(directory / "adapter_config.json", adapter.config())
        record = reconstruction(adapter.figures, terms[0].vector.layers, truncation, dtype)
        _tell(note, loss_remark(record, adapter.enough))
        write_json(directory / RECONSTRUCTION, record)
        revision = terms[0].vector.manifest.start_identity.revision
        card = adapter_card(target.name, total.source.location, total.source.revision or revision, terms, record, command)
        (directory / "README.md").write_text(card, "utf-8")
    return target


class _Adapter:
    """The content of the adapter's files; whole weights are computed when they are asked for.

    Attributes:
        figures: By tensor of the checkpoint: how it is held, its rank, and ‖error‖² and ‖τ‖².
    """

    def __init__(self, total: Sum, structure: Structure, plan: Plan, truncation: Truncation, dtype: torch.dtype | None) -> None:
        self._total, self._structure, self._plan, self._dtype = total, structure, plan, dtype
        self.figures: dict[str, tuple[str, int | None, float, float]] = {}
        self._scale = common_scale(held for name, _ in plan.factors.values() for held in total.low_rank(name))
        self._factors = {path: self._factored(*found, truncation) for path, found in plan.factors.items()}
        if truncation.energy is None:
            # One rank for all: other tools read no rank_pattern.
            most = max(found.rank for found in self._factors.values())
            self._factors = {path: found.padded(most) if found.cut else found for path, found in self._factors.items()}
        self._config = self._lora_config()
        self._keys = self._expected()
        self._tensors = {key: tensor for path, found in self._factors.items() for key, tensor in self._as_stored(path, found).items()}
        odd = {key for key, tensor in self._tensors.items() if self._keys.get(key) != tuple(tensor.shape)}
        whole = {key: self._held(key) for key in set(self._keys) - set(self._tensors)}
        odd |= {key for key, held in whole.items() if held is None}
        if odd:
            raise LataError(f"peft takes the adapter for other modules than it is made for; different are {first_three(odd)}")
        missing = {piece for held in whole.values() if held is not None for piece in structure.missing(held)}
        if missing:
            raise LataError(f"an adapter holds modules whole, and the start model lacks parts of those that change: {first_three(missing)}")

    def _factored(self, name: str, form: Form, truncation: Truncation) -> Factored:
        parts, shape = self._total.parts(name), self._total.weights.shape(name)
        side: Any = "left" if form in ("linear", "convolution") else "right"
        try:
            found = factored(shape, parts, truncation, scale=self._scale, scaled_side=side, dtype=self._dtype or torch.float32)
        except CorruptFileError as error:
            raise CorruptFileError(f"{name}: {error}") from error
        self.figures[name] = ("cut" if found.cut else "factors", found.rank, *squares(parts, found.low_rank.rows()))
        return found

    def _lora_config(self) -> Any:
        from peft import LoraConfig
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

        module = self._structure.module
        kind = type(module).__name__
        causal, pairs = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()
        ranks = {path: found.rank for path, found in self._factors.items()}
        # The largest, which servers size their buffers by.
        most = max(ranks.values())
        # Longer paths first, as the first pattern that ends a path is taken.
        odd = sorted((path for path in ranks if ranks[path] != most), key=lambda path: (-len(path), path))
        identity = self._total.source
        return LoraConfig(
            # Other task types would add modules of their own accord.
            task_type="CAUSAL_LM" if kind in causal else "SEQ_2_SEQ_LM" if kind in pairs else None,
            auto_mapping={"base_model_class": kind, "parent_library": type(module).__module__},
            base_model_name_or_path=identity.location,
            revision=identity.revision,
            r=most,
            lora_alpha=_alpha(self._scale, most),
            rank_pattern={path: ranks[path] for path in odd},
            alpha_pattern={path: _alpha(self._scale, ranks[path]) for path in odd},
            target_modules=self._targets(),
            modules_to_save=list(self._plan.saved) or None,
            fan_in_fan_out=any(form == "turned" for _, form in self._plan.factors.values()),
            bias="all" if self._plan.biases else "none",
            ensure_weight_tying=self._ties(),
            inference_mode=True,
        )

    def _ties(self) -> bool:
        """Whether whole weights are tied in the one way peft can keep: of the input embedding and linear layers without a bias."""
        covered = tuple(f"{path}." for path in self._plan.saved)
        whole = [self._structure.by_name[name] for name in self._structure.by_name if covered and name.startswith(covered)]
        module: Any = self._structure.module
        others = [
            module.get_submodule(path)
            for held in whole
            if len(held.names) > 1
            for path in held.owners
            if module.get_submodule(path) is not module.get_input_embeddings()
        ]
        return bool(others) and all(isinstance(other, nn.Linear) and other.bias is None for other in others)

    def _targets(self) -> list[str]:
        """The last words of the paths, as they are usually given, where they mean just these modules; the whole paths otherwise."""
        paths = set(self._plan.factors)
        words = {path.rpartition(".")[2] for path in paths}
        meant = {path for path, _ in self._structure.module.named_modules() if path.rpartition(".")[2] in words}
        return sorted(words if meant == paths else paths)

    def _expected(self) -> dict[str, tuple[int, ...]]:
        """Shape by key of all that peft itself would save of such an adapter on such a model."""
        from peft import get_peft_model
        from peft.utils import get_peft_model_state_dict

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                # On the meta device nothing is initialised, so no random number is drawn.
                with torch.device("meta"):
                    model = get_peft_model(deepcopy(self._structure.module), deepcopy(self._config))
                saved = get_peft_model_state_dict(model, save_embedding_layers=False)
            except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
                raise LataError(
                    f"peft cannot adapt {type(self._structure.module).__name__} so: {str(error).partition(chr(10))[0]}"
                ) from error
        # With bias="all" peft saves the biases of both copies of a whole module as well, and needs neither when it loads.
        return {
            key: tuple(tensor.shape) for key, tensor in saved.items() if not {"original_module", "modules_to_save"} & set(key.split("."))
        }

    def _as_stored(self, path: str, found: Factored) -> dict[str, Tensor]:
        form = self._plan.factors[path][1]
        first, second = (found.right, found.left) if form in ("linear", "convolution") else (found.left.T, found.right.T)
        if form == "embedding":
            return {f"{_PREFIX}{path}.lora_embedding_A": first.contiguous(), f"{_PREFIX}{path}.lora_embedding_B": second.contiguous()}
        if form == "convolution":
            kernel = found.shape[2:]
            first = first.reshape(found.rank, found.shape[1], *kernel)
            second = second.reshape(found.shape[0], found.rank, *[1] * len(kernel))
        return {f"{_PREFIX}{path}.lora_A.weight": first.contiguous(), f"{_PREFIX}{path}.lora_B.weight": second.contiguous()}

    def _held(self, key: str) -> Held | None:
        return self._structure.by_name.get(key.removeprefix(_PREFIX).replace(".base_layer.", "."))

    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape by key."""
        return {key: (self._dtype_of(key), shape) for key, shape in self._keys.items()}

    def _dtype_of(self, key: str) -> torch.dtype:
        if key in self._tensors:
            return self._tensors[key].dtype
        held = self._held(key)
        origin = self._total.source.dtype(held.pieces[0]) if held is not None else torch.float32
        return self._dtype if self._dtype is not None and origin.is_floating_point else origin

    def value(self, key: str) -> Tensor:
        """The tensor to store under a key."""
        if key in self._tensors:
            return self._tensors[key]
        held = self._held(key)
        if held is None:
            raise KeyError(key)
        return self._structure.tensor(held, lambda name: self._whole(name, self._dtype_of(key)))

    def _whole(self, name: str, dtype: torch.dtype) -> Tensor:
        if not dtype.is_floating_point:
            return self._total.source.read(name)
        try:
            merged, parts = self._total.merged(name, dtype), self._total.parts(name)
        except CorruptFileError as error:
            raise CorruptFileError(f"{name}: {error}") from error
        if parts:
            self.figures[name] = ("whole", None, *squares(parts, rows_between(self._total.weights.read(name), merged)))
        return merged

    @property
    def enough(self) -> dict[str, int]:
        """By module that was cut down, the rank that would keep nearly all of it."""
        return {path: found.enough for path, found in self._factors.items() if found.enough is not None}

    def size_remark(self, size: int) -> str | None:
        """Whether the adapter, of so many bytes, is large beside the model."""
        start = self._total.source
        model_size = layout_size({name: (start.dtype(name), start.shape(name)) for name in start.names})
        whole: dict[str, int] = {}
        for key, entry in self.layout().items():
            if key not in self._tensors:
                module = key.removeprefix(_PREFIX).rpartition(".")[0]
                whole[module] = whole.get(module, 0) + layout_size({key: entry})
        return size_remark(size, model_size, whole)

    def config(self) -> dict[str, Any]:
        """What ``adapter_config.json`` holds, lists in order."""
        found = self._config.to_dict()
        return {key: sorted(value) if isinstance(value, set) else value for key, value in sorted(found.items())}


def _tell(note: Callable[[str], None] | None, remark: str | None) -> None:
    if note is not None and remark is not None:
        note(remark)


def _alpha(scale: float, rank: int) -> float:
    """The lora_alpha that peft divides by the rank to get a scale; whole where that is the same."""
    alpha = scale * rank
    near = [round(alpha), alpha, nextafter(alpha, inf), nextafter(alpha, -inf)]
    return next((number for number in near if number / rank == scale), alpha)
