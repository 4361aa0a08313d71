"""Weights and inputs of the towers whose embeddings are in golden/towers.npz: drawn anew, so that they need no file.

Beside them small towers as people have them on disk.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

from clip_m2df.clip.formats import openai_name
from tests.conftest import save_tokenizer


def drawn_weights(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, Tensor]:
    """Weights as large as trained ones, so that activations and heads matter; numpy keeps this generator's numbers."""
    generator = np.random.RandomState(seed)
    state = {}
    for name in sorted(shapes):
        values = generator.standard_normal(shapes[name])
        if name.endswith("running_var"):
            values = np.exp(0.2 * values)
        elif len(shapes[name]) < 2:  # of norms the scales, and all biases
            values = 0.1 * values + name.endswith("weight")
        else:
            rows = name in ("visual.proj", "text_projection", "text.text_projection")
            inputs = shapes[name][0] if rows else np.prod(shapes[name][1:])
            values *= (1.0 if len(shapes[name]) == 4 else 1.5) / np.sqrt(inputs) if "embedding" not in name else 0.5
        state[name] = torch.tensor(values, dtype=torch.float32)
    return state


def drawn_inputs(image_size: int, context_length: int, vocab_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two normalised images, and the tokens of three texts, whose end is the largest and which zeros follow."""
    generator = np.random.RandomState(seed)
    images = generator.standard_normal((2, 3, image_size, image_size))
    tokens = np.zeros((3, context_length), dtype=np.int64)
    for row, length in zip(tokens, (3, context_length // 2, context_length), strict=True):
        row[:length] = [vocab_size - 2, *generator.randint(1, vocab_size - 2, length - 2), vocab_size - 1]
    return torch.tensor(images, dtype=torch.float32), torch.tensor(tokens)


def save_open_clip(folder: Path, *, text: bool = True) -> Path:
    """A small CLIP as OpenCLIP saves it, its configuration and, if it has a text tower, its tokenizer beside it.

    Returns:
        The file of weights: images of 32 pixels, 77 tokens, embeddings of 32.
    """
    from transformers import CLIPConfig, CLIPModel

    folder.mkdir(parents=True)
    vocab_size = save_tokenizer(folder, ByteLevel.alphabet())
    tower: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "hidden_act": "gelu"}
    model = CLIPModel(
        CLIPConfig(
            text_config={**tower, "num_attention_heads": 1, "vocab_size": vocab_size, "eos_token_id": vocab_size - 1},
            vision_config={**tower, "num_attention_heads": 2, "image_size": 32, "patch_size": 8},
            projection_dim=32,
        )
    )
    state: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items():
        named, parts = openai_name(name), [name.replace("q_proj", f"{part}_proj") for part in "qkv"]
        if not text and not named.startswith("visual."):
            continue
        if "q_proj" in name:
            state[named] = torch.cat([model.state_dict()[part] for part in parts])
        elif "k_proj" not in name and "v_proj" not in name:
            state[named] = weight.T.contiguous() if named in ("visual.proj", "text_projection") else weight
    save_file(state, folder / "open_clip_model.safetensors")
    vision = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32}
    told = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": {"heads": 1, "vocab_size": vocab_size}}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": told}), encoding="utf-8")
    return folder / "open_clip_model.safetensors"
