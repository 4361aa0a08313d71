"""DINOv3 (Siméoni et al., 2025) with a vision transformer, an encoder of images alone."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from clip_m2df.clip.families import Family, Tower
from clip_m2df.clip.families.dinov2 import MEAN, STD


class DINOv3(Family):
    """A vision transformer with rotary positions, for images of any size, whose class token is the embedding."""

    kind = model_type = "dinov3_vit"
    name = "DINOv3"
    config = "DINOv3ViTConfig"
    visual = Tower(
        (
            *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"),
            *("layer_norm_eps", "attention_dropout", "drop_path_rate", "rope_theta", "num_register_tokens"),
            *("query_bias", "key_bias", "value_bias", "proj_bias", "mlp_bias", "use_gated_mlp"),
            *("image_size", "patch_size", "num_channels"),
        ),
        *("hidden_size", "DINOv3ViTModel", "DINOv3ViTConfig"),
        # Draws at every training step, made by no seed of the training, which belong to its own training.
        fixed={"pos_embed_shift": None, "pos_embed_jitter": None, "pos_embed_rescale": None},
    )
    projections = {
        "q": ("attention.q_proj",),
        "k": ("attention.k_proj",),
        "v": ("attention.v_proj",),
        "o": ("attention.o_proj",),
        "fc1": ("mlp.up_proj", "mlp.gate_proj"),  # the gate of the largest models
        "fc2": ("mlp.down_proj",),
    }
    any_size = True
    processor = "DINOv3ViTImageProcessor"
    mean, std, resample = MEAN, STD, 2
    not_needed = ("embeddings.mask_token",)
    renames = ((r"^layer\.", "model.layer."),)

    def visual_tower(self, config: Mapping[str, Any]) -> nn.Module:
        """The tower without its mask, of its own training: weights without a gradient fail on several devices."""
        tower = self.visual.build(config)
        tower.model.embeddings.mask_token = None  # type: ignore[union-attr]
        return tower


FAMILY = DINOv3()
