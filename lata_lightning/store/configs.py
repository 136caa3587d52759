"""Whether two configs describe the same function of the weights: every key counts unless it is known not to."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

_FLOAT_TAG = "__float__"
_NOT_FINITE = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
_LENGTH = re.compile(r"(^|\.)(max_position_embeddings|n_positions|n_ctx|max_sequence_length|max_seq_len|seq_length|model_max_length)$")
# Rotary embeddings that do not depend on the length, or record the length they were made for.
_FIXED_ROPE = ("default", "linear", "axial", "proportional", "llama3", "yarn", None)
_IRRELEVANT = re.compile(
    # Origin of the model, and which program wrote or loads the config.
    r"_.*|name_or_path|transformers_version|architectures|auto_map|torch_dtype|dtype|use_bfloat16|torchscript|unsloth_.*|tokenizer_class|"
    r"attn_implementation|experts_implementation|use_flash_attn|use_flash_attention_2|pretraining_tp|gradient_checkpointing|quantization_config|"
    r"chunk_size_feed_forward|tf_legacy_loss|"
    # Outputs of a call.
    r"use_cache|return_dict|return_dict_in_generate|output_.*|"
    # Numbers and meanings of rows: tokenizers are compared token by token, heads by their shapes.
    r"vocab_size|num_labels|id2label|label2id|problem_type|finetuning_task|task_specific_params|prefix|"
    r"(bos|eos|pad|sep|cls|mask|unk|decoder_start|forced_bos|forced_eos)_token_id|"
    # Generation of text.
    r"max_length|min_length|max_new_tokens|do_sample|early_stopping|num_beams|num_beam_groups|num_return_sequences|diversity_penalty|top_p|typical_p|"
    r"repetition_penalty|length_penalty|forced_decoder_ids|cache_implementation|no_repeat_ngram_size|encoder_no_repeat_ngram_size|bad_words_ids|remove_invalid_values|"
    r"exponential_decay_length_penalty|suppress_tokens|begin_suppress_tokens|"
    # Initialisation and training.
    r"initializer_range|initializer_factor|initializer_cutoff_factor|init_std|init_xavier_std|(layer|logit)_scale_init_value|"
    r".*dropout.*|.*pdrop|drop_path_rate|.*layerdrop|label_smoothing|.*loss.*|router_jitter_noise|aux_loss_alpha|seq_aux|"
    r"apply_spec_augment|mask_(time|feature|channel)_.*|ctc_zero_infinity|neftune_noise_alpha"
)


def relevant(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a config without the keys that do not change what the weights compute, in plain JSON types.

    Numbers that are not finite are written as transformers writes them: ``{"__float__": "Infinity"}``.
    """
    return {key: _plain(value) for key, value in config.items() if not _IRRELEVANT.fullmatch(key)}


def config_differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return both values by dotted key, where two configs describe different functions of the same weights.

    Where transformers knows the type of the model, both configs are completed by its defaults first. So an old and a new spelling are equal, and so are a
    default that is written and one that is not. A key that only one side has and that the config class does not know is ignored. Other configs are
    compared as they are; None, False and a missing key are equal. Where one config names no type of model, as the first ones did, it is that of
    the other.

    Args:
        one: Content of config.json, of a config's ``to_dict()``, or what ``relevant`` returns for it.
        other: The same, for the second model.
    """
    if relevant(one) == relevant(other):
        return {}
    kinds = one.get("model_type"), other.get("model_type")
    if None not in kinds and kinds[0] != kinds[1]:
        return {"model_type": kinds}
    kind = kinds[0] if kinds[1] is None else kinds[1]
    one, other = {**one, "model_type": kind}, {**other, "model_type": kind}
    left, right = (dict(_leaves(relevant(_completed(config)))) for config in (one, other))
    keys = dict.fromkeys([*left, *right])
    different = {key: (left.get(key), right.get(key)) for key in keys if not _same(left.get(key), right.get(key))}
    defaults = _completed({"model_type": kind})
    if len(defaults) > 1:
        different = {key: values for key, values in different.items() if None not in values or _is_known(key, defaults)}
    if _length_is_capacity(left) and _length_is_capacity(right):
        return {key: values for key, values in different.items() if not _LENGTH.search(key)}
    return different


def _same(one: Any, other: Any) -> bool:
    absent = (None, False)
    return one == other or (any(one is nothing for nothing in absent) and any(other is nothing for nothing in absent))


def _is_known(key: str, defaults: Mapping[str, Any]) -> bool:
    """Return whether the config class of a model, or of the part of it that a dotted key belongs to, has that key."""
    part: Any = defaults
    for word in key.split("."):
        # Settings that are no config of a part, as those of rotary embeddings, do not list all their keys.
        if not isinstance(part, Mapping) or "model_type" not in part:
            return True
        if word not in part:
            # Old releases had settings of rotary embeddings under many names.
            return "rope" in word or "rotary" in word
        part = part[word]
    return True


def _length_is_capacity(leaves: Mapping[str, Any]) -> bool:
    """Return whether the longest allowed input does not change the outputs of shorter ones: no rotary scaling is derived from it."""
    return all(kind in _FIXED_ROPE for key, kind in leaves.items() if key.endswith(("rope_type", "rope_scaling.type")))


def _completed(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a config with the defaults of its class; the config itself where transformers has no class for it."""
    plain: dict[str, Any] = _decoded(config)
    import transformers

    kind = plain.pop("model_type", None)
    if kind not in transformers.CONFIG_MAPPING:
        return config
    log = transformers.utils.logging
    level = log.get_verbosity()
    # Its warnings are about token ids, which are not compared here.
    log.set_verbosity_error()
    try:
        made: dict[str, Any] = transformers.AutoConfig.for_model(
            kind, **{key: value for key, value in plain.items() if key[:1] != "_"}
        ).to_dict()
    except Exception:
        # This release may refuse a config that another one wrote in any way: then it is compared as it is.
        return config
    finally:
        log.set_verbosity(level)
    return made


def _leaves(value: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, entry in value.items():
        # Redundant keys: the old name of rope_type, and the layer from which on a window slides.
        if (key == "type" and "rope_type" in value) or (key == "max_window_layers" and value.get("layer_types")):
            continue
        if isinstance(entry, Mapping) and set(entry) != {_FLOAT_TAG}:
            yield from _leaves(entry, f"{path}{key}.")
        else:
            yield f"{path}{key}", entry


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        if set(value) == {_FLOAT_TAG}:
            return dict(value)
        return {str(key): _plain(entry) for key, entry in value.items() if not _IRRELEVANT.fullmatch(str(key))}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT_TAG: "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _decoded(value: Any) -> Any:
    """Return a value with numbers that are not finite as floats, which configs write as objects."""
    if isinstance(value, Mapping):
        if set(value) == {_FLOAT_TAG}:
            return _NOT_FINITE.get(value[_FLOAT_TAG], value)
        return {key: _decoded(entry) for key, entry in value.items()}
    return [_decoded(entry) for entry in value] if isinstance(value, list | tuple) else value
