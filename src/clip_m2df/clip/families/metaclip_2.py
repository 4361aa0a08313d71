"""MetaCLIP 2 (Chuang et al., 2025): CLIP's architecture, and a tokenizer of 901,629 tokens in all languages."""

from clip_m2df.clip.families import Family, Tower
from clip_m2df.clip.families.clip import MEAN, PROJECTIONS, STD, TEXT_FIELDS, VISUAL_FIELDS


class MetaCLIP2(Family):
    """CLIP's towers in classes of their own: the first end of a text is pooled, whatever its number."""

    kind = model_type = "metaclip_2"
    name = "MetaCLIP 2"
    config = "MetaClip2Config"
    visual = Tower(
        *(VISUAL_FIELDS, "projection_dim"),
        *("MetaClip2VisionModelWithProjection", "MetaClip2VisionConfig", "image_embeds"),
    )
    text = Tower(
        *(TEXT_FIELDS, "projection_dim"),
        *("MetaClip2TextModelWithProjection", "MetaClip2TextConfig", "text_embeds"),
        fixed={"bos_token_id": None, "pad_token_id": None},
    )
    shared = ("projection_dim",)
    projections = PROJECTIONS
    positions = "model.vision_model.embeddings.position_embedding.weight"
    prefix = 1
    processor = "CLIPImageProcessor"
    mean, std, crops = MEAN, STD, True


FAMILY = MetaCLIP2()
