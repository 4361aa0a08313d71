"""SigLIP (Zhai et al., 2023) and SigLIP 2 (Tschannen et al., 2025) at a fixed resolution, which is the same class."""

from clip_m2df.clip.families import Family, Tower
from clip_m2df.clip.families.clip import PROJECTIONS

_FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("hidden_act", "layer_norm_eps", "attention_dropout"),
)


# A vision transformer that pools by attention, and a text transformer whose last token is the embedding.
FAMILY = Family(
    kind="siglip",
    name="SigLIP",
    relatives={
        "siglip2": "a SigLIP 2 for images of any shape (NaFlex), which is not taken: give one of a fixed resolution, "
        "such as google/siglip2-base-patch16-224"
    },
    config="SiglipConfig",
    visual=Tower(
        fields=(*_FIELDS, "image_size", "patch_size", "num_channels"),
        dim="hidden_size",
        model="SiglipVisionModel",
        inside="vision_model.",
    ),
    # The fixed three play no part in the tower.
    text=Tower(
        fields=(*_FIELDS, "vocab_size", "max_position_embeddings", "projection_size"),
        dim="projection_size",
        model="SiglipTextModel",
        inside="text_model.",
        fixed={"bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
    ),
    projections=PROJECTIONS,
    positions="model.embeddings.position_embedding.weight",
    processor="SiglipImageProcessor",
)
