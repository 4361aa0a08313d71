"""CLIP's towers as modules: transformers' for ViT and text, our own for OpenAI's modified ResNet; and what fills them.

transformers is imported where it is used, because it takes seconds and a ResNet without text doesn't need it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clip_m2df.errors import UserError, some
from clip_m2df.nn.openai_clip import openai_part
from clip_m2df.nn.resnet import ModifiedResNet


class _Tower(nn.Module):
    """A tower of transformers' as a plain function from a tensor to its embeddings."""

    def __init__(self, model: nn.Module, output: str) -> None:
        super().__init__()
        self.model = model
        self.output = output

    def forward(self, x: Tensor) -> Tensor:
        embeddings: Tensor = getattr(self.model(x), self.output)
        return embeddings


def visual_tower(config: Mapping[str, Any]) -> nn.Module:
    """Normalised images ``(n, 3, image_size, image_size)`` to embeddings ``(n, dim)``."""
    values = {key: value for key, value in config.items() if key != "kind"}
    if config["kind"] == "resnet":
        # What convolutions like best on a GPU in half precision; the values are the same.
        return ModifiedResNet(**values).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    return _Tower(CLIPVisionModelWithProjection(CLIPVisionConfig(**values)), "image_embeds")


def text_tower(config: Mapping[str, Any]) -> nn.Module:
    """Tokens ``(n, length)`` to embeddings ``(n, dim)``."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    # These two play no part in the tower, but their defaults are refused for a small vocabulary.
    values = CLIPTextConfig(**config, bos_token_id=None, pad_token_id=None)
    return _Tower(CLIPTextModelWithProjection(values), "text_embeds")


def load_weights(
    backbone: nn.Module, names: Mapping[str, str], state: Mapping[str, Tensor], source: str, *, strict: bool = True
) -> None:
    """Load ``state``, whose keys are the values of ``names``, under the backbone's own, its keys.

    Args:
        backbone: Where the weights go, whatever the floating type that they come in.
        names: The backbone's own names, and what its weights are called in ``state``.
        state: The weights.
        source: Where they come from, for messages.
        strict: Refuse weights that the backbone has no place for.

    Raises:
        UserError: Names those that are missing, left over, or of another shape.
    """
    expected = set(names.values())
    problems = []
    # Files older than this counter have no use for it either.
    if missing := [key for key in expected - state.keys() if not key.endswith("num_batches_tracked")]:
        problems.append(f"missing: {some(sorted(missing))}")
    if strict and (unexpected := state.keys() - expected):
        problems.append(f"unexpected: {some(sorted(unexpected))}")
    if problems:
        raise UserError(f"the weights of {source} aren't those of one CLIP; {'; '.join(problems)}")

    own = backbone.state_dict()
    for key, name in names.items():
        if name not in state:
            continue
        weight = openai_part(key, name, state[name])
        if weight.shape != own[key].shape:
            raise UserError(
                f"the weights of {source} aren't those of one CLIP; "
                f"{name} is {tuple(weight.shape)} where {tuple(own[key].shape)} belongs"
            )
        own[key].copy_(weight)  # the very memory of the parameters; float16 becomes float32 here
