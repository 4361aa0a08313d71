"""Adapters in files of their own, by peft's names: written apart from their tower, and read beside its weights."""

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from clip_m2df.clip.families import Family
from clip_m2df.clip.formats import MERGE_IT, read_json
from clip_m2df.errors import UserError, some
from clip_m2df.files import check_regular
from clip_m2df.weight_files import digest_of, read_weights

# How a model with adapters is saved: with its tower, added to its tower's weights, or without its tower.
Kept = Literal["kept", "merged", "apart"]
# Peft's own files of an adapter, and what it puts before the names of layers in them.
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# What peft calls the one adapter of a layer; in files it has no name.
NAME = "default"
# What of peft's configurations changes nothing of a LoRA, or is obeyed here. All else has to be off.
_FIELDS = (
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "lora_dropout", "inference_mode", "base_model_name_or_path", "revision"),
    *("task_type", "peft_version", "auto_mapping", "runtime_config", "megatron_core", "qalora_group_size"),
)
_VALUES = {"bias": ("none",), "init_lora_weights": (True, "gaussian")}


def tower_checksum(state: Mapping[str, Tensor]) -> dict[str, str]:
    """What tells the weights in a backbone's state dict, but for its adapters: ``dtype``, and ``sha256`` of all."""
    own = {name.replace(".base_layer.", "."): weight for name, weight in state.items() if ".lora_" not in name}
    dtype = str(next(iter(own.values())).dtype).removeprefix("torch.")
    return {"dtype": dtype, "sha256": digest_of(dict(sorted(own.items())))}


def peft_files(
    state: Mapping[str, Tensor], adapters: Mapping[str, Any], family: Family, source: str
) -> tuple[str, dict[str, Tensor]]:
    """What peft's two files have of a backbone's adapters.

    Args:
        state: The backbone's.
        adapters: See :func:`clip_m2df.clip.adapters.check_adapters`.
        family: Of the visual tower.
        source: What the tower is called in them.

    Returns:
        The text of the configuration, and the weights by peft's names.
    """
    named = {
        family.file_name(name).replace(f".{NAME}.", "."): weight for name, weight in state.items() if ".lora_" in name
    }
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": source,
        "r": adapters["r"],
        "lora_alpha": adapters["alpha"],
        "lora_dropout": adapters["dropout"],
        "target_modules": list(dict.fromkeys(name.partition(".lora_")[0] for name in named)),
        "bias": "none",
        "inference_mode": True,
    }
    return json.dumps(config, indent=2) + "\n", {_PREFIX + name: weight for name, weight in named.items()}


def adapted_state(weights: Mapping[str, Tensor], tower: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
    """The state dict of a backbone with adapters.

    Args:
        weights: Of the adapters, by peft's names.
        tower: The state dict of the same backbone without adapters.
        family: Of the visual tower.
    """
    layers = {family.file_name(name): name for name in (key.rpartition(".")[0] for key in tower)}
    state = {}
    for name, weight in weights.items():
        layer, _, part = name.removeprefix(_PREFIX).partition(".lora_")
        state[f"{layers.get(layer, layer)}.lora_{part.replace('.', f'.{NAME}.')}"] = weight
    adapted = {name.partition(".lora_")[0] for name in state}
    for name, weight in tower.items():
        layer, _, part = name.rpartition(".")
        state[f"{layer}.base_layer.{part}" if layer in adapted else name] = weight
    return state


# Adapters beside the weights of a folder


def read_adapter(folder: Path, source: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """The configuration and the weights of the adapter in a folder in transformers' format; None if there is none.

    Raises:
        UserError: One of its two files is missing or damaged, or it is no LoRA as it is applied here.
    """
    config, weights = folder / CONFIG, folder / WEIGHTS
    check_regular(config, "adapter's configuration")
    if not config.is_file() and not weights.is_file():
        return None
    if missing := [file.name for file in (config, weights) if not file.is_file()]:
        raise UserError(f"{source} has an adapter, but no {missing[0]}: fetch it again, or move the rest elsewhere")
    values = read_json(config)
    if not (folder / "config.json").is_file():
        base = values.get("base_model_name_or_path")
        raise UserError(
            f"{source} has an adapter alone, of {base!r:.200} by its own words: put the files of that model beside it"
        )
    if (kind := values.get("peft_type")) != "LORA":
        raise UserError(f"{source} has an adapter of type {kind!r:.80}, and LORA alone is applied here: {MERGE_IT}")
    for name, value in values.items():
        if name not in _FIELDS and value and value not in _VALUES.get(name, ()):
            raise UserError(f"{source} has an adapter with {name} {value!r:.80}, which is not applied here: {MERGE_IT}")
    for name, wanted, kinds in (("r", "a whole number", (int,)), ("lora_alpha", "a number", (int, float))):
        value = values.get(name, 8)
        if type(value) not in kinds or not 0 < value < 2**31:
            raise UserError(f"{config}: {name} is {value!r:.80}; it must be {wanted} above 0: fetch it again")
    if type(values.get("use_rslora", False)) is not bool or not isinstance(values.get("rank_pattern") or {}, dict):
        raise UserError(f"{config} is damaged: use_rslora is true or false, and rank_pattern a table; fetch it again")
    return values, read_weights(weights)


def apply_adapter(
    adapter: tuple[Mapping[str, Any], Mapping[str, Tensor]],
    state: Mapping[str, Tensor],
    family: Family,
    own: Collection[str],
    source: str,
) -> dict[str, Tensor]:
    """The weights of a folder with those of the adapter beside them added.

    Args:
        adapter: See :func:`read_adapter`.
        state: The folder's weights by the names that transformers' classes have.
        family: Of the towers.
        own: Those names.
        source: The folder, for messages.

    Raises:
        UserError: The adapter is of another model.
    """
    config, weights = adapter
    weights = family.renamed({name.removeprefix(_PREFIX): weight for name, weight in weights.items()}, own)
    alpha = config.get("lora_alpha", 8)
    ranks = [config.get("r", 8), *(config.get("rank_pattern") or {}).values()]
    problems: dict[str, str] = {}
    layers = {name: name.partition(".lora_")[0] for name in weights}
    added = dict(state)
    for layer in dict.fromkeys(layers.values()):
        parts = [f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"]
        if stray := {name for name, of in layers.items() if of == layer} ^ {*parts}:
            problems |= dict.fromkeys(sorted(stray), "missing or of no LoRA")
            continue
        if wrong := [n for n in parts if not weights[n].is_floating_point() or not weights[n].float().isfinite().all()]:
            problems[wrong[0]] = "not finite (NaN or infinite), or of no floating type"
            continue
        (down, up), weight = (weights[part].float() for part in parts), added.get(f"{layer}.weight")
        shape = tuple(up.shape[:1] + down.shape[1:])
        if weight is None or down.shape[:1] != up.shape[1:] or shape != weight.shape:
            there = "nothing" if weight is None else tuple(weight.shape)
            problems[layer] = f"of {tuple(up.shape)} by {tuple(down.shape)} where the model has {there}"
            continue
        if (rank := len(down)) not in ranks or rank < 1:
            problems[layer] = f"of rank {rank} where {CONFIG} has r {some(map(str, ranks))}"
            continue
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        added[f"{layer}.weight"] = (weight.float() + scale * up @ down).to(weight.dtype)
    if problems or not layers:
        named = some(f"{name} is {problem}" for name, problem in problems.items())
        base = config.get("base_model_name_or_path")
        raise UserError(
            f"the adapter in {source} is of another model, by its own words of {base!r:.200}: {named or 'it is empty'};"
            f" give the folder of that, or move {CONFIG} and {WEIGHTS} elsewhere"
        )
    return added
