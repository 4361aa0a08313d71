"""Feature tables: features of videos in one file, computed elsewhere or by ``clip-m2df encode``, and no videos.

A table stands where a manifest of videos stands. It is a safetensors or a Parquet file of one row a video with its
path, label, split and features ``(frames, dim)``; a training video may have several rows, its augmentations. Beside it
may lie ``NAME.classes.safetensors`` or ``NAME.classes.parquet`` with an embedding for each class, which stands for that
of its prompt.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clip_m2df.datasets.manifest import TABLE_SUFFIXES, Manifest, Video
from clip_m2df.errors import UserError, printable, some
from clip_m2df.files import check_regular, whole_file
from clip_m2df.weight_files import write_weights

FORMAT = "clip-m2df feature table 1"
CLASSES_FORMAT = "clip-m2df class embeddings 1"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What a row may lack.
_OPTIONAL = ("group", "augmentation")
# Rows whose numbers are checked at once.
_CHECKED = 1024
# How many times larger than its file a table may be.
_MOST_PACKED = 64


@dataclass(frozen=True, eq=False)
class FeatureTable:
    """The features of videos.

    Attributes:
        source: The file, for messages.
        manifest: The videos; their paths are names alone, and no file need be there.
        features: ``(rows, frames, dim)``; of a safetensors file they are read from the disk as they are needed.
        rows: The index of each row in ``features``, by the path of its ``Video`` and the number of its augmentation, 0
            where it has none.
        augmentations: How many each training video has; 0 where its features are those of an evaluation.
        class_embeddings: ``(dim)`` by label, in float32; empty where there is no file of them.
    """

    source: str
    manifest: Manifest
    features: Tensor
    rows: Mapping[tuple[str, int], int]
    augmentations: int
    class_embeddings: Mapping[str, Tensor]

    @property
    def frames(self) -> int:
        """Frames of a video."""
        return self.features.shape[1]

    @property
    def dim(self) -> int:
        """Width of the features."""
        return self.features.shape[2]

    def of(self, videos: Sequence[tuple[str, int]]) -> Tensor:
        """Copy the features ``(videos, frames, dim)`` of videos, each by its path and augmentation."""
        return self.features[[self.rows[video] for video in videos]]


def is_feature_table(path: str | os.PathLike[str]) -> bool:
    """Tell from its name whether a file is a feature table, and no manifest or video; a folder never is."""
    return Path(path).suffix.lower() in TABLE_SUFFIXES and not os.path.isdir(path)


def classes_file(path: str | os.PathLike[str]) -> Path:
    """The file beside a feature table that has its class embeddings."""
    return Path(path).with_suffix(f".classes{Path(path).suffix}")


def read_feature_table(path: str | os.PathLike[str]) -> FeatureTable:
    """Read a feature table, with its class embeddings where they lie beside it, and check all of it.

    Args:
        path: A ``.safetensors`` file with the tensor ``features (n, frames, dim)`` and the metadata ``format``
            (``clip-m2df feature table 1``) and ``rows``, a JSON list of objects with ``path``, ``label``, ``split``,
            ``group`` if known (:attr:`Video.group`) and for augmented training videos ``augmentation``; or a
            ``.parquet`` file with these columns and ``features``,
            lists of lists of numbers. Class embeddings are likewise a tensor ``embeddings (n, dim)`` with ``rows`` of
            ``label`` (format ``clip-m2df class embeddings 1``), or the columns ``label`` and ``embedding``.

    Raises:
        UserError: A file cannot be read, or a row is at fault; the message names both.
    """
    source = os.fspath(path)
    rows, features = _read(source, "feature table", "features", FORMAT)
    manifest, index, augmentations = _checked_rows(rows, features, source)
    embeddings: dict[str, Tensor] = {}
    if os.path.lexists(beside := classes_file(path)):  # a broken link is an error
        labels, tensor = _read(str(beside), "file of class embeddings", "embeddings", CLASSES_FORMAT)
        embeddings = _checked_classes(labels, tensor, str(beside))
        _check_fit(manifest, features, embeddings, source, str(beside))
    for other in (Path(path).with_suffix(suffix) for suffix in TABLE_SUFFIXES) if not embeddings else ():
        if classes_file(other).exists() and not other.exists():
            raise UserError(
                f"there are class embeddings in {classes_file(other)}, and those of {source} have to be in"
                f" {beside.name}, a file of its own kind: write them as such, or name the table like them"
            )
    if features.dtype == torch.float64:  # in which no head computes
        features = features.float()
    return FeatureTable(source, manifest, features, index, augmentations, embeddings)


def write_feature_table(
    path: str | os.PathLike[str],
    rows: Sequence[Mapping[str, Any]],
    features: Tensor | NDArray[Any],
    class_embeddings: Mapping[str, Tensor | NDArray[Any]] | None = None,
) -> None:
    """Write a feature table and its class embeddings, whole or not at all.

    Args:
        path: The file, ``.safetensors`` or ``.parquet``; one that is there is replaced.
        rows: ``path``, ``label``, ``split``, ``group`` if known and for augmented training videos ``augmentation``, of
            each row.
        features: ``(rows, frames, dim)``, a tensor or an array of numpy's.
        class_embeddings: ``(dim)`` by label, likewise; they go to the file beside it, ``NAME.classes.safetensors`` or
            ``NAME.classes.parquet``.

    Raises:
        UserError: The name ends otherwise, a row is at fault, a file cannot be written; or there are no class
            embeddings, and a file beside the table would be taken for its own.
    """
    source, beside = os.fspath(path), classes_file(path)
    if not is_feature_table(path):
        raise UserError(
            f"cannot write the feature table {source}: name a file that ends in {' or '.join(TABLE_SUFFIXES)}"
        )
    rows, features = [dict(row) for row in rows], _as_tensor(features, f"the features for {source}")
    manifest, _, _ = _checked_rows(rows, features, source)
    if class_embeddings:
        labels = [{"label": label} for label in class_embeddings]
        parts = [_as_tensor(part, f"the class embeddings for {beside}") for part in class_embeddings.values()]
        if len({part.shape for part in parts}) > 1:
            raise UserError(f"the class embeddings for {beside} are of several widths: give embeddings of one space")
        tensor = torch.stack(parts)
        _check_fit(manifest, features, _checked_classes(labels, tensor, str(beside)), source, str(beside))
    else:
        check_no_classes(path)
    with ExitStack() as drafts:
        # Both are written before either takes its place.
        if class_embeddings:
            draft = drafts.enter_context(whole_file(beside, "class embeddings"))
            _write(draft, beside.suffix, labels, "embeddings", tensor, CLASSES_FORMAT)
        draft = drafts.enter_context(whole_file(Path(path), "feature table"))
        _write(draft, Path(path).suffix, rows, "features", features, FORMAT)


def _as_tensor(numbers: Tensor | NDArray[Any], what: str) -> Tensor:
    try:
        return torch.as_tensor(numbers).detach().cpu().contiguous()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{what} are no table of numbers ({error}): give a tensor or an array") from error


def check_no_classes(path: str | os.PathLike[str]) -> None:
    """Check that no file of class embeddings lies where a table without them is to be written.

    Raises:
        UserError: There is one.
    """
    if (beside := classes_file(path)).exists():
        raise UserError(
            f"the table {os.fspath(path)} gets no class embeddings, and those in {beside} would be taken for its own:"
            " delete that file, or name another table"
        )


# Checks


def _checked_rows(
    rows: Sequence[Mapping[str, Any]], features: Tensor, source: str
) -> tuple[Manifest, dict[tuple[str, int], int], int]:
    """The manifest of a table's rows, the index of each, and how many augmentations training videos have."""
    what = f"the feature table {source}"
    if features.ndim != 3 or 0 in features.shape:
        raise UserError(
            f"{what} has features of shape {tuple(features.shape)}: give (videos, frames, dim), at least one of each"
        )
    if len(rows) != len(features):
        raise UserError(f"{what} has {len(rows)} rows and the features of {len(features)}: give each row its own")
    folder = os.path.dirname(os.path.abspath(source))
    index: dict[tuple[str, int], int] = {}
    videos: dict[str, Video] = {}
    lines = []
    known: dict[str, list[int]] = {}  # the augmentations that there are of each training video
    for number, row in enumerate(rows):
        where = f"row {number + 1} of {what}"
        for name in ("path", "label", "split"):
            _check_text(row.get(name), name, where)
        extra = {}
        if row.get("group") not in (None, ""):
            _check_text(row["group"], "group", where)
            extra = {"group": row["group"].strip()}
        path = os.path.abspath(os.path.join(folder, row["path"]))
        video = Video(path, row["label"], row["split"], text=row["label"], extra=extra)
        augmentation = row.get("augmentation")
        if augmentation is not None and (type(augmentation) is not int or augmentation < 0 or video.split != "train"):
            raise UserError(
                f"{where} has the augmentation {augmentation!r:.40} in {video.split}: give whole numbers from 0, and to"
                " rows of train alone"
            )
        first = index.setdefault((video.path, augmentation or 0), number)
        if first != number:
            raise UserError(
                f"{what} lists {row['path']!r} twice, on row {first + 1} and on row {number + 1}: remove one"
            )
        if augmentation is not None:
            known.setdefault(video.path, []).append(augmentation)
        if videos.setdefault(video.path, video) is video:
            lines.append(number + 1)
        elif videos[video.path] != video:
            raise UserError(
                f"{where} has another label or split, or another group, than a row before with its path: give it the"
                " same"
            )
    several = {"lines": lines} if len(videos) < len(rows) else {}  # else the rows are the manifest's own
    manifest = Manifest(videos.values(), root=folder, source=what, **several)
    training = [video.path for video in manifest.videos if video.split == "train"]
    most = max(map(len, known.values()), default=0)
    for path in training if most else ():
        if sorted(known.get(path, [])) != list(range(most)):
            raise UserError(
                f"{what} has the augmentations {sorted(known.get(path, []))} of {path}, and {most} of another training"
                f" video: give each of them 0 to {most - 1}"
            )
    _check_numbers(features, [row["path"] for row in rows], "a frame", what)
    return manifest, index, most


def _checked_classes(rows: Sequence[Mapping[str, Any]], embeddings: Tensor, source: str) -> dict[str, Tensor]:
    what = f"the file of class embeddings {source}"
    if embeddings.ndim != 2 or 0 in embeddings.shape or len(rows) != len(embeddings):
        raise UserError(
            f"{what} has {len(rows)} labels and embeddings of shape {tuple(embeddings.shape)}: give (classes, dim)"
        )
    for number, row in enumerate(rows):
        _check_text(row.get("label"), "label", f"row {number + 1} of {what}")
    labels = [row["label"] for row in rows]
    if twice := [label for label, count in Counter(labels).items() if count > 1]:
        raise UserError(f"{what} has the class {twice[0]!r} twice: remove one")
    _check_numbers(embeddings.unsqueeze(1), labels, "an embedding", what)
    return dict(zip(labels, embeddings.float(), strict=True))


def _check_fit(
    manifest: Manifest, features: Tensor, embeddings: Mapping[str, Tensor], source: str, beside: str
) -> None:
    """Check that class embeddings are those of a table: as wide as its features, and one for each class."""
    width = len(next(iter(embeddings.values())))
    if width != features.shape[2]:
        raise UserError(
            f"the class embeddings in {beside} have {width} numbers each, and the features in {source}"
            f" {features.shape[2]}: give embeddings of one space"
        )
    labels = dict.fromkeys(video.label for video in manifest.videos)
    if missing := [label for label in labels if label not in embeddings]:
        raise UserError(
            f"{beside} has no embedding of {missing[0]!r} and {len(missing) - 1} more of the {len(labels)} classes of"
            f" {source}: add a row for each, by the same label; or delete the file, for heads that need no prompts"
        )


def _check_text(cell: object, name: str, where: str) -> None:
    # JSON can say lone surrogates, which no file of UTF-8 holds.
    if not isinstance(cell, str) or not cell.strip() or re.search("[\n\r\0\ud800-\udfff]", cell):
        raise UserError(f"{where} has the {name} {cell!r:.80}: give a text of one line, in UTF-8")


def _check_numbers(numbers: Tensor, names: Sequence[str], part: str, what: str) -> None:
    """Refuse other types, what is not finite, and what is all zeros, which has no direction.

    Args:
        numbers: ``(rows, parts, dim)``.
        names: of the rows.
        part: what of a row can be zeros.
        what: of whose rows, for messages.
    """
    if numbers.dtype not in DTYPES:
        raise UserError(f"{what} has numbers of the type {numbers.dtype}: give float16, bfloat16, float32 or float64")
    for start in range(0, len(numbers), _CHECKED):
        chunk = numbers[start : start + _CHECKED].float()
        faults = {
            "values that are not finite (NaN, infinite, or too large for float32)": ~chunk.isfinite().all(-1).all(-1),
            f"{part} of zeros": ~chunk.any(-1).all(-1),
        }
        for fault, at in faults.items():
            if at.any():
                row = start + int(at.nonzero()[0])
                raise UserError(f"row {row + 1} of {what}, {names[row]!r:.200}, has {fault}: mend it, or leave it out")


# Files


def _read(source: str, what: str, name: str, form: str) -> tuple[list[dict[str, Any]], Tensor]:
    """The rows of a table, each without its numbers, and their numbers as one tensor."""
    check_regular(source, what)
    if not os.path.exists(source):
        raise UserError(f"there is no {what} {source}: check the name; relative names start at {os.getcwd()}")
    if source.lower().endswith(".parquet"):
        return _read_parquet(source, what, name)
    try:
        with safe_open(source, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != form or name not in file.keys():  # noqa: SIM118
                raise UserError(
                    f"{source} is no {what}: it needs the tensor {name!r}, and metadata with the format {form!r} and"
                    " rows; clip-m2df encode and write_feature_table write such files"
                )
            tensor = file.get_tensor(name)
        rows = json.loads(metadata.get("rows", ""))
    except UserError:
        raise
    except (SafetensorError, OSError, ValueError, RecursionError) as error:  # ValueError: also of a number too long
        raise UserError(
            f"cannot read the {what} {source} ({error}): it is damaged, or no safetensors file; write it anew"
        ) from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"the metadata rows of the {what} {source} are no list of objects: write it anew")
    return rows, tensor


def _write(draft: Path, suffix: str, rows: Sequence[Mapping[str, Any]], name: str, numbers: Tensor, form: str) -> None:
    """Write what :func:`_read` reads."""
    if suffix.lower() == ".parquet":
        _write_parquet(draft, rows, name, numbers)
        return
    try:
        write_weights(draft, {name: numbers.contiguous()}, {"format": form, "rows": json.dumps(rows)})
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _read_parquet(source: str, what: str, name: str) -> tuple[list[dict[str, Any]], Tensor]:
    pa = _pyarrow()
    name, texts, parts = (
        ("features", ["path", "label", "split"], ("frames", "numbers a frame"))
        if name == "features"
        else ("embedding", ["label"], ("numbers",))
    )
    try:
        with pa.parquet.ParquetFile(source) as file:
            there = file.schema_arrow.names
            if missing := [column for column in (*texts, name) if column not in there]:
                raise UserError(
                    f"the {what} {source} has no column {missing[0]!r}: it needs {', '.join((*texts, name))}, and has"
                    f" {some(map(repr, there))}"
                )
            if twice := [column for column in (*texts, *_OPTIONAL, name) if there.count(column) > 1]:
                raise UserError(f"the {what} {source} has the column {twice[0]!r} twice: remove one")
            cells = [column for column in (*texts, *_OPTIONAL) if column in there]
            _check_size(file.metadata, source, what)
            table = file.read(columns=[*cells, name], use_threads=False)
            columns = {column: table[column].to_pylist() for column in cells}
    except (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read the {what} {source} ({printable(str(error)):.200}): it is damaged, or no Parquet file; write"
            " it anew"
        ) from error
    if "augmentation" in columns:  # where some are missing, pandas makes floats of whole numbers
        columns["augmentation"] = [
            int(cell) if isinstance(cell, float) and cell.is_integer() else cell for cell in columns["augmentation"]
        ]
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return rows, _numbers(pa, table[name], parts, f"{name} of the {what} {source}")


def _check_size(metadata: Any, source: str, what: str) -> None:
    """Refuse a file that unpacks to far more than its size: features hardly compress."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    columns = [group.column(index) for group in groups for index in range(group.num_columns)]
    inside = sum(max(column.total_uncompressed_size, 2 * column.num_values) for column in columns)
    if inside > _MOST_PACKED * os.path.getsize(source) + 2**24:
        raise UserError(
            f"the {what} {source} unpacks from {os.path.getsize(source)} bytes to {inside}, and features hardly"
            " compress: write it anew, or as .safetensors"
        )


def _numbers(pa: Any, column: Any, parts: Sequence[str], what: str) -> Tensor:
    """A column of lists of floating numbers, all as long as the first, as one tensor.

    Args:
        pa: The module pyarrow.
        column: A ``ChunkedArray`` of lists, or of lists of lists.
        parts: What a list has, from the outside to the inside.
        what: What the column is, for messages.
    """
    types, shape, chunks, before = pa.types, [0] * len(parts), [], 0
    lists = f"lists{' of lists' * (len(parts) - 1)} of floating numbers"
    wrong = UserError(f"the {what} is of the type {column.type}: give {lists}")
    for array in column.chunks:
        n_rows, per_row = len(array), 1
        for level, part in enumerate((*parts, "")):
            if array.null_count:
                row = before + array.is_null().index(True).as_py() // per_row + 1
                raise UserError(f"row {row} of the {what} has an empty cell: fill it in, or leave the row out")
            if not part or not len(array):
                break
            if types.is_fixed_size_list(array.type):
                lengths = np.full(len(array), array.type.list_size)
            elif types.is_list(array.type) or types.is_large_list(array.type):
                lengths = array.value_lengths().to_numpy(zero_copy_only=False)
            else:
                raise wrong
            shape[level] = shape[level] or int(lengths[0])
            if len(other := (lengths != shape[level]).nonzero()[0]):
                row = before + other[0] // per_row + 1
                raise UserError(
                    f"row {row} of the {what} has {lengths[other[0]]} {part}, and the first {shape[level]}: give all"
                    " rows as many"
                )
            array, per_row = array.flatten(), per_row * shape[level]
        if len(array) and not types.is_floating(array.type):
            raise wrong
        if len(array):
            chunks.append(array.to_numpy(zero_copy_only=False))
        before += n_rows
    numbers = np.concatenate(chunks) if chunks else np.zeros(0, np.float32)
    return torch.from_numpy(numbers).reshape(before, *shape)


def _write_parquet(draft: Path, rows: Sequence[Mapping[str, Any]], name: str, numbers: Tensor) -> None:
    pa = _pyarrow()
    # Arrow has no bfloat16, all of which float32 holds.
    numbers = numbers.float() if numbers.dtype == torch.bfloat16 else numbers
    lists = pa.array(numbers.contiguous().flatten().numpy())
    for length in reversed(numbers.shape[1:]):
        lists = pa.FixedSizeListArray.from_arrays(lists, length)
    names = [n for n in ("path", "label", "split", *_OPTIONAL) if any(n in row for row in rows)]
    columns = {n: pa.array([row.get(n) for row in rows]) for n in names}
    columns["features" if name == "features" else "embedding"] = lists
    pa.parquet.write_table(pa.table(columns), draft)


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            "Parquet files need pyarrow: pip install clip-m2df[parquet]; or take a .safetensors file"
        ) from error
    return pyarrow
