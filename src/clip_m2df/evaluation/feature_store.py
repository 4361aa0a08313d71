"""Features of videos on disk, for the next evaluation with the same tower.

A file of safetensors for each tower, precision and way of reading frames: ``features``, ``(videos, frames, dim)``, and
in its metadata ``videos``, a JSON list of what tells each video and its state. A row whose video has changed, or a file
of another tower, is never used.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from clip_m2df.files import whole_file

FORMAT = "clip-m2df features 1"


class FeatureStore:
    """The features that one tower made of videos.

    Args:
        folder: where files are; made when first written.
        tower: its weights tell it.
        how: how frames are read and computed, in words.
    """

    def __init__(self, folder: str | Path, tower: nn.Module, how: str) -> None:
        state = hashlib.sha256(how.encode())
        for name, weight in tower.state_dict().items():
            state.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            state.update(_bytes(weight.detach().cpu()))
        self.key = state.hexdigest()
        self.path = Path(folder) / f"features-{self.key[:16]}.safetensors"

    def read(self) -> dict[str, Tensor]:
        """Features ``(frames, dim)`` by what tells their video; nothing where there are none that can be trusted."""
        if not self.path.exists():
            return {}
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata()
                if (metadata["format"], metadata["key"]) != (FORMAT, self.key):
                    raise ValueError("another format or tower")
                features = file.get_tensor("features")
                if _checksum(metadata["videos"], features) != metadata["sha256"]:
                    raise ValueError("another checksum")
                return dict(zip(json.loads(metadata["videos"]), features, strict=True))
        except (OSError, SafetensorError, ValueError, LookupError, TypeError, RuntimeError) as error:
            warnings.warn(f"the features in {self.path} can't be used ({error}): they are made anew", stacklevel=2)
            return {}

    def write(self, features: Mapping[str, Tensor]) -> None:
        """Put features there, by what tells their video, in the place of all that were."""
        rows = torch.stack([feature.cpu() for feature in features.values()])
        videos = json.dumps(list(features))
        metadata = {"format": FORMAT, "key": self.key, "videos": videos, "sha256": _checksum(videos, rows)}
        try:
            with whole_file(self.path) as draft:
                save_file({"features": rows}, draft, metadata)
        except (OSError, SafetensorError) as error:  # the evaluation itself is worth more
            warnings.warn(f"the features can't be kept in {self.path}: {error}", stacklevel=2)


def _checksum(videos: str, features: Tensor) -> str:
    return hashlib.sha256(videos.encode() + _bytes(features)).hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    content: bytes = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return content
