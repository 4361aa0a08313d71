"""MetaCLIP 2 (Chuang et al., 2025): CLIP's architecture, and a tokenizer of 901,629 tokens in all languages."""

from clip_m2df.clip.families import Family, Tower
from clip_m2df.clip.families.clip import MEAN, PROJECTIONS, STD, TEXT_FIELDS, VISUAL_FIELDS

# CLIP's towers in classes of their own: the first end of a text is pooled, whatever its number.
FAMILY = Family(
    kind="metaclip_2",
    name="MetaCLIP 2",
    config="MetaClip2Config",
    visual=Tower(
        fields=VISUAL_FIELDS,
        dim="projection_dim",
        model="MetaClip2VisionModelWithProjection",
        config="MetaClip2VisionConfig",
        output="image_embeds",
    ),
    text=Tower(
        fields=TEXT_FIELDS,
        dim="projection_dim",
        model="MetaClip2TextModelWithProjection",
        config="MetaClip2TextConfig",
        output="text_embeds",
        fixed={"bos_token_id": None, "pad_token_id": None},
    ),
    shared=("projection_dim",),
    projections=PROJECTIONS,
    positions="model.vision_model.embeddings.position_embedding.weight",
    prefix=1,
    processor="CLIPImageProcessor",
    mean=MEAN,
    std=STD,
    crops=True,
)
