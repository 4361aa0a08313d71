"""DINOv3 (Siméoni et al., 2025) with a vision transformer, an encoder of images alone."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from clip_m2df.clip.families import Family, Tower
from clip_m2df.clip.families.dinov2 import MEAN, STD
from clip_m2df.errors import UserError


class DINOv3(Family):
    """Its classes find out at the first image that heads don't fit."""

    def visual_tower(self, config: Mapping[str, Any]) -> nn.Module:
        """The tower, whose heads are as wide as rotary positions need them."""
        width, heads = config["hidden_size"], config["num_attention_heads"]
        if width % (4 * heads):
            raise UserError(f"{heads} heads: the width {width} has to be a multiple of 4 channels for each")
        return super().visual_tower(config)


# A vision transformer with rotary positions, for images of any size, whose class token is the embedding. What its own
# training drew at every step, scales of the positions, is left out: draws of a training here come from its seeds.
FAMILY = DINOv3(
    kind="dinov3_vit",
    name="DINOv3",
    config="DINOv3ViTConfig",
    visual=Tower(
        fields=(
            *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"),
            *("layer_norm_eps", "attention_dropout", "drop_path_rate", "rope_theta", "num_register_tokens"),
            *("query_bias", "key_bias", "value_bias", "proj_bias", "mlp_bias", "use_gated_mlp"),
            *("image_size", "patch_size", "num_channels"),
        ),
        dim="hidden_size",
        model="DINOv3ViTModel",
        unused=("embeddings.mask_token",),
        fixed={"pos_embed_shift": None, "pos_embed_jitter": None, "pos_embed_rescale": None},
    ),
    projections={
        "q": ("attention.q_proj",),
        "k": ("attention.k_proj",),
        "v": ("attention.v_proj",),
        "o": ("attention.o_proj",),
        "fc1": ("mlp.up_proj", "mlp.gate_proj"),  # the gate of the largest models
        "fc2": ("mlp.down_proj",),
    },
    any_size=True,
    processor="DINOv3ViTImageProcessor",
    mean=MEAN,
    std=STD,
    resample=2,
    renames=((r"^layer\.", "model.layer."),),
)
