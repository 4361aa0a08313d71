"""CLIP-M²DF: few-shot action recognition by multi-view distillation based on multi-modal fusion."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from clip_m2df.classifier.classifier import FewShotClassifier, NotFittedError
    from clip_m2df.data.datamodule import EpisodeDataModule
    from clip_m2df.data.manifest import Manifest
    from clip_m2df.episode import Episode
    from clip_m2df.errors import UserError
    from clip_m2df.module import CLIPM2DF
    from clip_m2df.nn.backbone import CLIPBackbone
    from clip_m2df.nn.m2df import M2DF, M2DFHead

# Imported when first asked for: torch, lightning and transformers take seconds.
_HOMES = {
    "CLIPM2DF": "module",
    "M2DF": "nn.m2df",
    "M2DFHead": "nn.m2df",
    "CLIPBackbone": "nn.backbone",
    "Episode": "episode",
    "EpisodeDataModule": "data.datamodule",
    "FewShotClassifier": "classifier.classifier",
    "Manifest": "data.manifest",
    "NotFittedError": "classifier.classifier",
    "UserError": "errors",
}

__all__ = [
    "CLIPM2DF",
    "M2DF",
    "CLIPBackbone",
    "Episode",
    "EpisodeDataModule",
    "FewShotClassifier",
    "M2DFHead",
    "Manifest",
    "NotFittedError",
    "UserError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
