"""CLIP in transformers' format: a folder's configurations, weights and preprocessing.

transformers is imported where it is used, because it takes seconds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from clip_m2df.errors import UserError
from clip_m2df.nn.weights import read_weights

# What CLIP was trained with; a folder in transformers' format may say otherwise.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# What of transformers' configurations makes a tower.
_TOWER_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "projection_dim",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "layer_norm_eps",
    "attention_dropout",
)
VISION_FIELDS = (*_TOWER_FIELDS, "image_size", "patch_size", "num_channels")
VISUAL_FIELDS = ("kind", "layers", "width", "dim", "image_size", *VISION_FIELDS)
TEXT_FIELDS = (*_TOWER_FIELDS, "vocab_size", "max_position_embeddings", "eos_token_id")


def transformers_name(key: str) -> str:
    """What transformers' files call one of the backbone's weights."""
    return key.removeprefix("visual.model.").removeprefix("text.model.")


def read_folder(folder: Path, source: str) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """The towers' configurations and the weights of a folder in transformers' format.

    Raises:
        UserError: It holds another model, no weights, or is damaged.
    """
    from transformers import CLIPConfig

    values = _read_json(folder / "config.json", f"{source} isn't a model in transformers' format")
    if values.get("model_type") != "clip":
        raise UserError(f"{source} is a model of type {values.get('model_type')!r}: the backbone has to be a 'clip'")
    try:  # through transformers, which fills in what a configuration leaves to defaults
        config = CLIPConfig.from_dict(values)
    except Exception as error:  # its validation errors have no common class
        raise UserError(f"the config.json of {source} can't be used: {error}") from error
    towers = {
        "vision_config": {field: getattr(config.vision_config, field) for field in VISION_FIELDS},
        "text_config": {field: getattr(config.text_config, field) for field in TEXT_FIELDS},
    }
    for tower in towers.values():
        tower["projection_dim"] = config.projection_dim  # a tower's own is what it would have alone, and often wrong

    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        if files := sorted(folder.glob(pattern)):
            return towers, {key: weight for file in files for key, weight in read_weights(file).items()}
    raise UserError(f"{source} has no weights: neither model.safetensors nor pytorch_model.bin is in the folder")


def read_preprocessing(folder: Path) -> tuple[list[float], list[float]]:
    """Mean and std of a folder in transformers' format; CLIP's where it has none.

    Raises:
        UserError: The file that should say is damaged.
    """
    values: dict[str, Any] = {}
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            values = _read_json(folder / name, "")
            values = values.get("image_processor", values)
    try:
        return list(values.get("image_mean", CLIP_MEAN)), list(values.get("image_std", CLIP_STD))
    except (AttributeError, TypeError) as error:
        raise UserError(f"the preprocessing in {folder} can't be used: {error}; mend or remove that file") from error


def _read_json(file: Path, otherwise: str) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{otherwise}: there is no {file.name} in it") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} is damaged: a table of names and values is expected")
    return values
