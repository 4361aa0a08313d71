"""Features of the videos that episodes name: with frozen weights each is encoded once, and can be kept on disk."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from clip_m2df.episode import VideoTable
from clip_m2df.files import whole_file
from clip_m2df.nn.m2df import M2DF

# How many are read and encoded together.
VIDEOS = 16


def encode_videos(
    model: M2DF,
    table: VideoTable,
    numbers: Sequence[int],
    *,
    rank: int = 0,
    world_size: int = 1,
    precision: str = "",
    keep: bool = True,
) -> Tensor:
    """Features of the videos that episodes name, each read and encoded once, by one of the ranks.

    What goes through the tower together is the same whatever the number of ranks, and so is every bit. Videos that
    can't be read are replaced, or end it, as the table has it. If the table has a folder for features, those that are
    there are taken, and the others are put there.

    Args:
        model: in eval mode.
        table: of the videos.
        numbers: the episodes that count.
        rank: of this process.
        world_size: number of processes.
        precision: the trainer's, which tells features on disk apart.
        keep: whether to use the table's folder for features.

    Returns:
        ``(videos, frames, dim)`` in the order of the table's videos, on the model's device; zero where no episode
        names the video.
    """
    store = _open_store(model, table, precision) if table.store and keep else None
    kept = store.read() if store and rank == 0 else {}
    if store and world_size > 1:  # one word for all: each has to miss the same
        box = [kept]
        torch.distributed.broadcast_object_list(box, src=0)
        (kept,) = box
    encoded: dict[int, Tensor] = {}
    fresh: dict[str, Tensor] = {}
    while indices := [index for index in table.named(numbers) if index not in encoded]:
        encoded |= {index: kept[name] for index in indices if (name := table.identity(index)) in kept}
        mine, unusable = _encode(model, table, [i for i in indices if i not in encoded], rank, world_size)
        encoded |= mine
        fresh |= {table.identity(index): feature for index, feature in mine.items()}
        if unusable:
            table.replace(unusable)
    if store and fresh and rank == 0:
        store.write(kept | fresh)
    some = next(iter(encoded.values()))
    features = torch.zeros((len(table.videos), *some.shape), dtype=some.dtype, device=model.device)
    for index, feature in encoded.items():
        features[index] = feature.to(model.device)
    return features


def _open_store(model: M2DF, table: VideoTable, precision: str) -> FeatureStore:
    tower = model.backbone
    preprocessing = [tower.visual_config, tower.mean.flatten().tolist(), tower.std.flatten().tolist()]
    how = json.dumps([table.reading, precision, preprocessing], sort_keys=True, default=str)
    return FeatureStore(str(table.store), tower.visual, how)


def _encode(
    model: M2DF, table: VideoTable, indices: Sequence[int], rank: int, world_size: int
) -> tuple[dict[int, Tensor], dict[str, str]]:
    """Features by index, and why other videos can't be read, by path; of all ranks, each of which does its share."""
    mine: dict[int, Tensor] = {}
    unusable: dict[str, str] = {}
    chunks = [indices[k : k + VIDEOS] for k in range(rank * VIDEOS, len(indices), world_size * VIDEOS)]
    for clips in table.clips(chunks):
        unusable |= clips.unusable
        if clips.frames is not None:
            features = model.encode_frames(clips.frames.to(model.device))
            mine |= dict(zip(clips.indices.tolist(), features, strict=True))
    if world_size > 1:
        everything: list[Any] = [None] * world_size
        torch.distributed.all_gather_object(everything, ({index: f.cpu() for index, f in mine.items()}, unusable))
        for features_of_rank, reasons in everything:
            mine |= features_of_rank
            unusable |= reasons
    return mine, unusable


FORMAT = "clip-m2df features 1"


class FeatureStore:
    """The features that one tower made of videos.

    Args:
        folder: where files are; made when first written.
        tower: its weights tell it.
        how: how frames are read and computed, in words.
    """

    def __init__(self, folder: str | Path, tower: nn.Module, how: str) -> None:
        self.key = digest_of(how, tower)
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


def digest_of(text: str, module: nn.Module) -> str:
    """SHA-256 of a text and of all weights of a module, in hexadecimal."""
    state = hashlib.sha256(text.encode())
    for name, weight in module.state_dict().items():
        state.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        state.update(_bytes(weight.detach().cpu()))
    return state.hexdigest()


def _checksum(videos: str, features: Tensor) -> str:
    return hashlib.sha256(videos.encode() + _bytes(features)).hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    content: bytes = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return content
