"""CLIP-M²DF: few-shot action recognition by multi-view distillation based on multi-modal fusion."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from clip_m2df.__about__ import __version__

if TYPE_CHECKING:
    from clip_m2df.classifier.classifier import FewShotClassifier, NotFittedError
    from clip_m2df.clip.backbone import CLIPBackbone
    from clip_m2df.datasets.manifest import Manifest
    from clip_m2df.episode import Episode
    from clip_m2df.episodes.datamodule import EpisodeDataModule
    from clip_m2df.errors import UserError
    from clip_m2df.nn.m2df import M2DF, M2DFHead
    from clip_m2df.training.module import CLIPM2DF

# Imported when first asked for: torch, lightning and transformers take seconds.
_HOMES = {
    "CLIPM2DF": "training.module",
    "M2DF": "nn.m2df",
    "M2DFHead": "nn.m2df",
    "CLIPBackbone": "clip.backbone",
    "Episode": "episode",
    "EpisodeDataModule": "episodes.datamodule",
    "FewShotClassifier": "classifier.classifier",
    "Manifest": "datasets.manifest",
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
