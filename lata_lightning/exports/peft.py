"""Exporting a LoRA adapter for peft: low-rank vectors exactly, dense ones truncated to a rank."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from math import inf, nextafter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lata_lightning.errors import CorruptFileError, LataError, differing, first_three
from lata_lightning.exports.cards import RECONSTRUCTION, adapter_card, reconstruction
from lata_lightning.exports.factors import Factored, Truncation, common_scale, factored, rows_between, squares
from lata_lightning.exports.plan import Plan, plan_adapter
from lata_lightning.exports.remarks import loss_remark, size_remark
from lata_lightning.exports.structure import AdapterForm, ModelTensor, Structure
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

    Tensors that all vectors store as factors are exact: lora_A is copied bit for bit, lora_B is multiplied by scale · coefficient, and the factors of
    several vectors are concatenated. Dense matrices are truncated to a rank. Tied weights, and tensors that are not matrices of a layer that peft can
    adapt, are stored whole (``modules_to_save``; ``bias="all"`` for biases), rounded as in a merge. Tensors that do not change are left out.

    ``reconstruction.json`` and the card record the relative error ‖τ − what the adapter adds‖ / ‖τ‖ by tensor, by layer and over all.

    Args:
        terms: The vectors, each with its scale.
        output: A directory that does not exist yet; written atomically.
        onto: The start model, if it is not at the location that the first vector records. It must have a config.
        dtype: Dtype of all tensors of the adapter; by default factors are float32, and whole weights have the dtype of the start.
        rank: Number of singular values to keep of each dense matrix; 16 if no energy is given either.
        energy: Share of ‖τ‖² to keep of each dense matrix, in (0, 1].
        check_base: Refuse a start model that is known to differ from the one that a vector started from, for which the start is read once.
        command: The command that makes the output, recorded in its card.
        progress: Called after each tensor that is written.
        note: Called with a sentence if the adapter is large compared with the model, before anything is written, and with one if it loses more than a
            tenth of the norm.

    Returns:
        The output directory. One dense tensor at a time and the factors of the adapter are in memory.

    Raises:
        BaseMismatchError: A vector started from another model.
        LayoutMismatchError: The tensors of a vector are not those of the start.
        LataError: An option is out of range, the modules of the start are not known, or an adapter can hold none of the changes.
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
    """The content of the adapter's files; weights that are stored whole are computed when they are written.

    Attributes:
        figures: For each tensor of the checkpoint: how it is stored, its rank, and ‖error‖² and ‖τ‖².
    """

    def __init__(self, total: Sum, structure: Structure, plan: Plan, truncation: Truncation, dtype: torch.dtype | None) -> None:
        self._total, self._structure, self._plan, self._dtype = total, structure, plan, dtype
        self.figures: dict[str, tuple[str, int | None, float, float]] = {}
        self._scale = common_scale(tensor for name, _ in plan.factors.values() for tensor in total.low_rank(name))
        self._factors = {path: self._factored(*entry, truncation) for path, entry in plan.factors.items()}
        if truncation.energy is None:
            # One rank for all, because other tools do not read rank_pattern.
            most = max(factors.rank for factors in self._factors.values())
            self._factors = {path: factors.padded(most) if factors.cut else factors for path, factors in self._factors.items()}
        self._config = self._lora_config()
        self._keys = self._expected()
        self._tensors = {key: tensor for path, factors in self._factors.items() for key, tensor in self._as_stored(path, factors).items()}
        odd = {key for key, tensor in self._tensors.items() if self._keys.get(key) != tuple(tensor.shape)}
        whole = {key: self._model_tensor(key) for key in set(self._keys) - set(self._tensors)}
        odd |= {key for key, tensor in whole.items() if tensor is None}
        if odd:
            raise LataError(
                f"peft takes the adapter for other modules than it is made for; {differing(odd, len({*self._keys, *self._tensors}))}"
            )
        missing = {name for tensor in whole.values() if tensor is not None for name in structure.missing(tensor)}
        if missing:
            raise LataError(f"an adapter holds modules whole, and the start model lacks parts of those that change: {first_three(missing)}")

    def _factored(self, name: str, form: AdapterForm, truncation: Truncation) -> Factored:
        differences, shape = self._total.differences(name), self._total.weights.shape(name)
        side: Any = "left" if form in ("linear", "convolution") else "right"
        try:
            result = factored(shape, differences, truncation, scale=self._scale, scaled_side=side, dtype=self._dtype or torch.float32)
        except CorruptFileError as error:
            raise CorruptFileError(f"{name}: {error}") from error
        self.figures[name] = ("cut" if result.cut else "factors", result.rank, *squares(differences, result.low_rank.rows()))
        return result

    def _lora_config(self) -> Any:
        from peft import LoraConfig
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

        module = self._structure.module
        kind = type(module).__name__
        causal, pairs = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()
        ranks = {path: factors.rank for path, factors in self._factors.items()}
        # The largest rank, from which servers compute the size of their buffers.
        most = max(ranks.values())
        # Longer paths first, because peft takes the first pattern that a path ends with.
        odd = sorted((path for path in ranks if ranks[path] != most), key=lambda path: (-len(path), path))
        identity = self._total.source
        return LoraConfig(
            # Other task types would add modules.
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
        """Return whether weights stored whole are tied in the only way that peft supports: input embedding and linear layers without a bias."""
        covered = tuple(f"{path}." for path in self._plan.saved)
        whole = [self._structure.by_name[name] for name in self._structure.by_name if covered and name.startswith(covered)]
        module: Any = self._structure.module
        others = [
            module.get_submodule(path)
            for tensor in whole
            if len(tensor.names) > 1
            for path in tensor.owners
            if module.get_submodule(path) is not module.get_input_embeddings()
        ]
        return bool(others) and all(isinstance(other, nn.Linear) and other.bias is None for other in others)

    def _targets(self) -> list[str]:
        """Return the last components of the paths, as is usual, if they select exactly these modules; otherwise the whole paths."""
        paths = set(self._plan.factors)
        words = {path.rpartition(".")[2] for path in paths}
        meant = {path for path, _ in self._structure.module.named_modules() if path.rpartition(".")[2] in words}
        return sorted(words if meant == paths else paths)

    def _expected(self) -> dict[str, tuple[int, ...]]:
        """Return, by key, the shapes of the tensors that peft itself would save of such an adapter on this model."""
        from peft import get_peft_model
        from peft.utils import get_peft_model_state_dict

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                # Nothing is initialised on the meta device, so the random state does not change.
                with torch.device("meta"):
                    model = get_peft_model(deepcopy(self._structure.module), deepcopy(self._config))
                saved = get_peft_model_state_dict(model, save_embedding_layers=False)
            except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
                raise LataError(
                    f"peft cannot adapt {type(self._structure.module).__name__} so: {str(error).partition(chr(10))[0]}"
                ) from error
        # With bias="all" peft also saves the biases of both copies of a whole module, and needs neither to load the adapter.
        return {
            key: tuple(tensor.shape) for key, tensor in saved.items() if not {"original_module", "modules_to_save"} & set(key.split("."))
        }

    def _as_stored(self, path: str, factors: Factored) -> dict[str, Tensor]:
        form = self._plan.factors[path][1]
        first, second = (factors.right, factors.left) if form in ("linear", "convolution") else (factors.left.T, factors.right.T)
        if form == "embedding":
            return {f"{_PREFIX}{path}.lora_embedding_A": first.contiguous(), f"{_PREFIX}{path}.lora_embedding_B": second.contiguous()}
        if form == "convolution":
            kernel = factors.shape[2:]
            first = first.reshape(factors.rank, factors.shape[1], *kernel)
            second = second.reshape(factors.shape[0], factors.rank, *[1] * len(kernel))
        return {f"{_PREFIX}{path}.lora_A.weight": first.contiguous(), f"{_PREFIX}{path}.lora_B.weight": second.contiguous()}

    def _model_tensor(self, key: str) -> ModelTensor | None:
        return self._structure.by_name.get(key.removeprefix(_PREFIX).replace(".base_layer.", "."))

    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return dtype and shape by key."""
        return {key: (self._dtype_of(key), shape) for key, shape in self._keys.items()}

    def _dtype_of(self, key: str) -> torch.dtype:
        if key in self._tensors:
            return self._tensors[key].dtype
        tensor = self._model_tensor(key)
        origin = self._total.source.dtype(tensor.stored_names[0]) if tensor is not None else torch.float32
        return self._dtype if self._dtype is not None and origin.is_floating_point else origin

    def value(self, key: str) -> Tensor:
        """Return the tensor to store under a key."""
        if key in self._tensors:
            return self._tensors[key]
        tensor = self._model_tensor(key)
        if tensor is None:
            raise KeyError(key)
        return self._structure.read(tensor, lambda name: self._whole(name, self._dtype_of(key)))

    def _whole(self, name: str, dtype: torch.dtype) -> Tensor:
        if not dtype.is_floating_point:
            return self._total.source.read(name)
        try:
            merged, differences = self._total.merged(name, dtype), self._total.differences(name)
        except CorruptFileError as error:
            raise CorruptFileError(f"{name}: {error}") from error
        if differences:
            self.figures[name] = ("whole", None, *squares(differences, rows_between(self._total.weights.read(name), merged)))
        return merged

    @property
    def enough(self) -> dict[str, int]:
        """For each truncated module, the rank that would keep ``ENOUGH`` of its squared norm."""
        return {path: factors.enough for path, factors in self._factors.items() if factors.enough is not None}

    def size_remark(self, size: int) -> str | None:
        """Return a sentence if an adapter of ``size`` bytes is large compared with the model."""
        start = self._total.source
        model_size = layout_size({name: (start.dtype(name), start.shape(name)) for name in start.names})
        whole: dict[str, int] = {}
        for key, entry in self.layout().items():
            if key not in self._tensors:
                module = key.removeprefix(_PREFIX).rpartition(".")[0]
                whole[module] = whole.get(module, 0) + layout_size({key: entry})
        return size_remark(size, model_size, whole)

    def config(self) -> dict[str, Any]:
        """Return the content of ``adapter_config.json``, with sorted keys and lists."""
        settings = self._config.to_dict()
        return {key: sorted(value) if isinstance(value, set) else value for key, value in sorted(settings.items())}


def _tell(note: Callable[[str], None] | None, remark: str | None) -> None:
    if note is not None and remark is not None:
        note(remark)


def _alpha(scale: float, rank: int) -> float:
    """Return the lora_alpha that divided by the rank gives exactly the scale; a whole number if one does."""
    alpha = scale * rank
    near = [round(alpha), alpha, nextafter(alpha, inf), nextafter(alpha, -inf)]
    return next((number for number in near if number / rank == scale), alpha)
