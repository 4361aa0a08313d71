"""CLIP (Radford et al., 2021) with a vision transformer, in transformers' classes."""

from collections.abc import Mapping
from typing import Any

from clip_m2df.clip.families import Family, Tower

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

_FIELDS = (
    *("hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads"),
    *("hidden_act", "layer_norm_eps", "attention_dropout"),
)
# The linear layers of a block, which SigLIP has under the same names.
PROJECTIONS = {
    **{name: (f"self_attn.{name}_proj",) for name in "qkv"},
    "o": ("self_attn.out_proj",),
    "fc1": ("mlp.fc1",),
    "fc2": ("mlp.fc2",),
}


class CLIP(Family):
    """CLIP's two vision and text transformers, each with a projection."""

    def configs(self, values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """The configurations; that of texts without a kind, as descriptions had it when there was one family."""
        visual, text = super().configs(values)
        assert text is not None
        del text["kind"]
        return visual, text


# The fixed two play no part in the tower, but their defaults are refused for a small vocabulary.
TEXT = Tower(
    fields=(*_FIELDS, "vocab_size", "max_position_embeddings", "eos_token_id"),
    dim="projection_dim",
    model="CLIPTextModelWithProjection",
    output="text_embeds",
    fixed={"bos_token_id": None, "pad_token_id": None},
)
FAMILY = CLIP(
    kind="vit",
    name="CLIP",
    config="CLIPConfig",
    visual=Tower(
        fields=(*_FIELDS, "image_size", "patch_size", "num_channels"),
        dim="projection_dim",
        model="CLIPVisionModelWithProjection",
        output="image_embeds",
    ),
    text=TEXT,
    shared=("projection_dim",),  # a tower's own is what it would have alone, and often wrong
    projections=PROJECTIONS,
    positions="model.vision_model.embeddings.position_embedding.weight",
    prefix=1,
    processor="CLIPImageProcessor",
    mean=MEAN,
    std=STD,
    crops=True,
)
