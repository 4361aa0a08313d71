"""MetaCLIP 2 (Chuang et al., 2025): CLIP's architecture, and a tokenizer of 901,629 tokens in all languages."""

from dataclasses import replace

from clip_m2df.clip.families import Family
from clip_m2df.clip.families.clip import FAMILY as CLIP
from clip_m2df.clip.families.clip import TEXT

# CLIP's towers in classes of their own: the first end of a text is pooled, whatever its number.
_OWN = {
    "kind": "metaclip_2",
    "name": "MetaCLIP 2",
    "config": "MetaClip2Config",
    "visual": replace(CLIP.visual, model="MetaClip2VisionModelWithProjection"),
    "text": replace(TEXT, model="MetaClip2TextModelWithProjection"),
}
FAMILY = Family(**vars(CLIP) | _OWN)
