"""CLIP-M²DF: few-shot action recognition by multi-view distillation based on multi-modal fusion."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from clip_m2df.__about__ import __version__ as __version__

if TYPE_CHECKING:
    from clip_m2df.classifier.classifier import FewShotClassifier as FewShotClassifier
    from clip_m2df.classifier.classifier import NotFittedError as NotFittedError
    from clip_m2df.clip.backbone import CLIPBackbone as CLIPBackbone
    from clip_m2df.datasets.manifest import Manifest as Manifest
    from clip_m2df.episode import Episode as Episode
    from clip_m2df.episodes.datamodule import EpisodeDataModule as EpisodeDataModule
    from clip_m2df.errors import UserError as UserError
    from clip_m2df.nn.m2df import M2DF as M2DF
    from clip_m2df.nn.m2df import M2DFHead as M2DFHead
    from clip_m2df.training.module import CLIPM2DF as CLIPM2DF

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
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
