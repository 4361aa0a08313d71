"""Reads what an offline W&B run wrote: its ``.wandb`` file, and the media beside it.

The file is a LevelDB log behind a header of seven bytes (":W&B", a magic number and a version): blocks of 32 KiB, in
them fragments with a checksum, a length and a type, which together make records, each a protobuf message.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import wandb
from wandb.proto import wandb_internal_pb2 as messages

HEADER = 7
BLOCK = 32 * 1024
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[Any]:
    """The records of a ``.wandb`` file, those only that are whole."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    at = HEADER
    parts: list[bytes] = []
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:  # too small for a fragment: padding
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        fragment = data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind == 0 or len(fragment) < length:
            return
        parts = [fragment] if kind in (FULL, FIRST) else [*parts, fragment]
        if kind in (FULL, LAST):
            record = messages.Record()  # type: ignore[attr-defined]
            record.ParseFromString(b"".join(parts))
            yield record


def end_wandb() -> None:
    """Write all runs to their ends, as where a process ends.

    W&B's teardown alone stops what writes, but leaves an open run in ``wandb.run``, which the next logger would take.
    """
    wandb.finish()
    wandb.teardown()


class OfflineRun:
    """All that one run's files say.

    Args:
        folder: ``wandb/offline-run-*``.

    Attributes:
        id: of the run.
        config: nested plain types.
        history: a dictionary a ``log``, its keys as they were given.
        artifacts: records of those that were logged.
        finished: whether the run was closed, and not only left.
    """

    def __init__(self, folder: Path) -> None:
        (path,) = folder.glob("run-*.wandb")
        self.media = folder / "files"
        self.id = path.stem.removeprefix("run-")
        self.config: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.artifacts: list[Any] = []
        self.finished = False
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                _put(self.config, record.run.config.update)
            elif kind == "config":
                _put(self.config, record.config.update)
            elif kind == "history":
                self.history.append({})
                _put(self.history[-1], record.history.item)
            elif kind == "artifact":
                self.artifacts.append(record.artifact)
            elif kind == "exit":
                self.finished = True

    def logged(self, key: str) -> list[Any]:
        """The values of a key, in order."""
        return [row[key] for row in self.history if key in row]

    def files(self, key: str) -> list[Path]:
        """The media files of a key, which are there."""
        paths = [self.media / value["path"] for value in self.logged(key)]
        assert all(path.is_file() for path in paths)
        return paths

    def artifact_files(self, name: str) -> dict[str, Path]:
        """The files of the last artifact whose name holds ``name``, by their path in it; each is there."""
        artifact = [a for a in self.artifacts if name in a.name][-1]
        files = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
        assert all(path.is_file() for path in files.values())
        return files

    def table(self, key: str) -> tuple[list[str], list[list[Any]]]:
        """Columns and rows of the last table of a key, the files of its images as paths."""
        files = self.artifact_files(key.replace("/", ""))
        content = json.loads(files[f"{key}.table.json"].read_text(encoding="utf-8"))
        rows = [[files[c["path"]] if isinstance(c, dict) else c for c in row] for row in content["data"]]
        return content["columns"], rows


def _put(table: dict[str, Any], items: Any) -> None:
    for item in items:
        *path, last = list(item.nested_key) or [item.key]
        place = table
        for name in path:
            place = place.setdefault(name, {})
        place[last] = json.loads(item.value_json)
