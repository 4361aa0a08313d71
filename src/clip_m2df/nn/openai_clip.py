"""CLIP in OpenAI's own layout: the architecture that the shapes tell, and what the weights are called."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from clip_m2df.errors import UserError
from clip_m2df.nn.transformers_clip import transformers_name

# Transformers' names and OpenAI's, all of which are tried.
_NAMES = (
    (r"^vision_model\.encoder\.layers", "visual.transformer.resblocks"),
    (r"^text_model\.encoder\.layers", "transformer.resblocks"),
    (r"self_attn\.[qkv]_proj\.", "attn.in_proj_"),
    (r"self_attn\.out_proj", "attn.out_proj"),
    (r"layer_norm(\d)", r"ln_\1"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding", "visual.conv1"),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm", "visual.ln_pre"),
    (r"^vision_model\.post_layernorm", "visual.ln_post"),
    (r"^visual_projection\.weight$", "visual.proj"),
    (r"^text_model\.embeddings\.token_embedding", "token_embedding"),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm", "ln_final"),
    (r"^text_projection\.weight$", "text_projection"),
)


def openai_visual_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the visual tower's architecture off the shapes; KeyError names a weight that isn't there."""
    if "visual.attnpool.positional_embedding" in state:
        return {
            "kind": "resnet",
            "layers": [_count(state, f"visual.layer{stage}") for stage in (1, 2, 3, 4)],
            "width": state["visual.layer1.0.conv1.weight"].shape[0],
            "dim": state["visual.attnpool.c_proj.weight"].shape[0],
            "image_size": _side(state["visual.attnpool.positional_embedding"]) * 32,
        }
    patch_size = state["visual.conv1.weight"].shape[-1]
    return {
        "kind": "vit",
        **_transformer_config(state, "visual.transformer"),
        "projection_dim": state["visual.proj"].shape[1],
        "image_size": _side(state["visual.positional_embedding"]) * patch_size,
        "patch_size": patch_size,
    }


def openai_text_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The same for the text tower."""
    return {
        **_transformer_config(state, "transformer"),
        "projection_dim": state["text_projection"].shape[1],
        "vocab_size": state["token_embedding.weight"].shape[0],
        "max_position_embeddings": state["positional_embedding"].shape[0],
        "eos_token_id": 2,  # transformers' sign for: the end of text is the largest id of each text
    }


def _transformer_config(state: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    intermediate, width = state[f"{prefix}.resblocks.0.mlp.c_fc.weight"].shape
    if width % 64:
        raise UserError(f"CLIP's heads have 64 channels, which the width {width} of {prefix} isn't a multiple of")
    return {
        "hidden_size": width,
        "intermediate_size": intermediate,
        "num_hidden_layers": _count(state, f"{prefix}.resblocks"),
        "num_attention_heads": width // 64,
        "hidden_act": "quick_gelu",
    }


def _count(state: Iterable[str], prefix: str) -> int:
    """How many numbered modules there are under a prefix."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return 1 + max((int(match[1]) for key in state if (match := pattern.match(key))), default=0)


def _side(positions: Tensor) -> int:
    """Height and width of the grid that ``(1 + height * width, ...)`` positions stand for."""
    return math.isqrt(positions.shape[0] - 1)


def openai_names(keys: Iterable[str], *, resnet: bool) -> dict[str, str]:
    """OpenAI's name of each of the backbone's weights.

    Args:
        keys: The backbone's own names.
        resnet: Whether the visual tower is the modified ResNet, whose names are OpenAI's.
    """
    names = {}
    for key in keys:
        if resnet and key.startswith("visual."):
            names[key] = key
            continue
        name = transformers_name(key)
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        names[key] = name
    return names


def openai_part(key: str, name: str, weight: Tensor) -> Tensor:
    """What the backbone keeps under ``key`` of the weight called ``name``."""
    if "attn.in_proj_" in name:  # OpenAI's layout stacks the maps to queries, keys and values
        return weight.chunk(3)["qkv".index(key.split("_proj.")[0][-1])]
    if name in ("visual.proj", "text_projection"):  # and multiplies by its projections from the right
        return weight.T
    return weight
