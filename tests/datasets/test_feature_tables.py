import json
import os
import random
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from clip_m2df.datasets.feature_tables import (
    classes_file,
    is_feature_table,
    read_feature_table,
    write_feature_table,
)
from clip_m2df.datasets.manifest import Manifest
from clip_m2df.errors import UserError
from tests.conftest import files_up_to
from tests.project.damage import damage

SUFFIXES = ("safetensors", "parquet")
FRAMES, DIM = 3, 5


def rows_of(*names: str) -> list[dict[str, Any]]:
    """Rows by names like ``train/wave/1.mp4``: split, label and file."""
    return [{"path": name, "label": name.split("/")[1], "split": name.split("/")[0]} for name in names]


ROWS = rows_of("train/wave/1.mp4", "train/hug/1.mp4", "train/wave/2.mp4", "val/eat (é)/1.mp4", "test/zap/ 1 .mp4")


def numbers(n: int = len(ROWS), frames: int = FRAMES, dim: int = DIM) -> Tensor:
    return torch.randn(n, frames, dim, generator=torch.Generator().manual_seed(n))


def embeddings(*labels: str, dim: int = DIM) -> dict[str, Tensor]:
    labels = labels or ("wave", "hug", "eat (é)", "zap", "of no video")
    return dict(zip(labels, torch.randn(len(labels), dim), strict=True))


def save(path: Path, rows: list[dict[str, Any]], features: Any, classes: Any = None) -> Path:
    """A table as somebody else's tool writes it: by safetensors or pyarrow alone, whatever is in it."""
    lists = features.tolist() if isinstance(features, Tensor) else features
    if path.suffix == ".parquet":
        names = dict.fromkeys(name for row in rows for name in row)
        columns = {name: pa.array([row.get(name) for row in rows]) for name in names}
        pq.write_table(pa.table(columns | {"features": lists}), path)
        if classes is not None:
            table = {"label": list(classes), "embedding": [e.tolist() for e in classes.values()]}
            pq.write_table(pa.table(table), classes_file(path))
    else:
        metadata = {"format": "clip-m2df feature table 1", "rows": json.dumps(rows)}
        save_file({"features": features.contiguous()}, path, metadata)
        if classes is not None:
            metadata = {"format": "clip-m2df class embeddings 1", "rows": json.dumps([{"label": c} for c in classes])}
            save_file({"embeddings": torch.stack(list(classes.values()))}, classes_file(path), metadata)
    return path


def refusal(path: Path, call: Callable[[], object] | None = None) -> str:
    """The message with which a table is refused: one line that names the file."""
    with pytest.raises(UserError) as caught:
        call() if call else read_feature_table(path)
    message = str(caught.value)
    assert str(path) in message or str(classes_file(path)) in message
    assert "\n" not in message
    return message


@pytest.fixture(params=SUFFIXES)
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / f"table.{request.param}"


# Reading and writing


@pytest.mark.parametrize("by", ["write_feature_table", "others"])
def test_a_table_is_a_manifest_with_features(file: Path, by: str) -> None:
    features, classes = numbers(), embeddings()
    (save if by == "others" else write_feature_table)(file, ROWS, features, classes)
    table = read_feature_table(file)
    assert (table.frames, table.dim, table.augmentations) == (FRAMES, DIM, 0)
    assert table.features.dtype == torch.float32
    # A manifest of the same rows, which names no other videos.
    lines = ["path,label,split", *(f"{r['path']},{r['label']},{r['split']}" for r in ROWS)]
    (file.parent / "m.csv").write_text("\n".join(lines))
    manifest = Manifest.read(file.parent / "m.csv", check_files=False)
    assert table.manifest.videos == manifest.videos
    assert (table.manifest.root, table.manifest.digest) == (manifest.root, manifest.digest)
    for split in manifest.splits:
        videos = [video for row in table.manifest.split(split).videos for video in row]
        wanted = [ROWS.index(next(r for r in ROWS if video.path.endswith(r["path"]))) for video in videos]
        assert table.of([(video.path, 0) for video in videos]).equal(features[wanted])
    assert table.class_embeddings.keys() == classes.keys()
    assert all(table.class_embeddings[label].equal(embedding) for label, embedding in classes.items())


@pytest.mark.parametrize("by", ["write_feature_table", "others"])
def test_groups_of_videos_are_kept(file: Path, by: str) -> None:
    groups = ["a", "", "a", "é 1", ""]
    rows = [row | ({"group": group} if group else {}) for row, group in zip(ROWS, groups, strict=True)]
    (save if by == "others" else write_feature_table)(file, rows, numbers())
    assert [video.group for video in read_feature_table(file).manifest.videos] == groups
    rows = [{**ROWS[0], "group": "a", "augmentation": n} for n in range(2)] + ROWS[3:]
    (save if by == "others" else write_feature_table)(file, rows, numbers(4))
    assert [video.group for video in read_feature_table(file).manifest.videos] == ["a", "", ""]


def test_augmentations_of_training_videos_are_told_apart(file: Path) -> None:
    rows = [dict(row, augmentation=a) for row in ROWS[:3] for a in (1, 0)] + ROWS[3:]
    features = numbers(len(rows))
    write_feature_table(file, rows, features)
    table = read_feature_table(file)
    assert table.augmentations == 2
    assert [os.path.relpath(video.path, file.parent) for video in table.manifest.videos] == [r["path"] for r in ROWS]
    path = str(file.parent / ROWS[1]["path"])
    assert table.of([(path, 0), (path, 1)]).equal(features[[3, 2]])
    assert not table.class_embeddings


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_numbers_keep_their_values(file: Path, dtype: torch.dtype) -> None:
    features = numbers().to(dtype)
    write_feature_table(file, ROWS, features, {label: e.to(dtype) for label, e in embeddings().items()})
    table = read_feature_table(file)
    assert table.features.double().equal(features.double() if dtype != torch.float64 else features.float().double())
    assert table.features.dtype in (dtype, torch.float32)
    assert all(embedding.dtype == torch.float32 for embedding in table.class_embeddings.values())


def test_parquet_tables_of_other_tools_are_read(tmp_path: Path) -> None:
    features = numbers(7)
    rows = rows_of(*(f"train/c{i % 2}/{i}.mp4" for i in range(7)))
    path = tmp_path / "table.parquet"
    for kind in (
        pa.list_(pa.list_(pa.float64())),
        pa.large_list(pa.large_list(pa.float32())),
        pa.list_(pa.list_(pa.float32(), DIM), FRAMES),
    ):
        columns: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
        columns["label"] = pa.array(columns["label"]).dictionary_encode()
        # Whole numbers with gaps, as pandas has them, and a column that is nobody's.
        columns |= {"augmentation": [0.0] * 7, "features": pa.array(features.tolist(), kind), "more": [None] * 7}
        pq.write_table(pa.table(columns), path, row_group_size=3)
        table = read_feature_table(path)
        assert table.features.equal(features)
        assert table.augmentations == 1


def test_a_table_is_told_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "folder.parquet").mkdir()
    assert is_feature_table("a/b.safetensors")
    assert is_feature_table(Path("B.PARQUET"))
    others = ("m.csv", "motion_shapes", "v.mp4", ".parquet", tmp_path / "folder.parquet")
    assert not any(is_feature_table(p) for p in others)
    with pytest.raises(UserError, match=r"table\.parquet is a feature table by its name"):
        Manifest.read(tmp_path / "table.parquet")


def test_a_large_table_is_read_from_the_disk_as_it_is_needed(tmp_path: Path) -> None:
    file, rows = tmp_path / "table.safetensors", rows_of(*(f"train/c/{i}.mp4" for i in range(3)))
    write_feature_table(file, rows, numbers(3))
    kept = read_feature_table(file)
    write_feature_table(file, rows, numbers(3) + 1)  # a new file in the place of the old one
    assert kept.features.equal(numbers(3))
    assert read_feature_table(file).features.equal(numbers(3) + 1)


# Faults


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([*ROWS[:4], {**ROWS[4], "label": ""}], "row 5 .* label ''"),
        ([*ROWS[:4], {**ROWS[4], "path": None}], "row 5 .* path None"),
        ([*ROWS[:4], {"path": "x.mp4", "label": "zap"}], "row 5 .* split None|no column"),
        ([*ROWS[:4], {**ROWS[4], "split": "dev"}], "row 5 .* split 'dev'"),
        ([*ROWS[:4], {**ROWS[4], "split": "train\n"}], "row 5 .* one line"),
        ([*ROWS[:4], {**ROWS[4], "label": "hug"}], "class 'hug' is in two splits, train on row 2 and test on row 5"),
        ([*ROWS[:4], ROWS[0]], "twice, on row 1 and on row 5: remove one"),
        ([*ROWS[:4], {**ROWS[0], "path": "train/./wave/1.mp4"}], "twice, on row 1 and on row 5"),
        ([*ROWS[:4], {**ROWS[4], "augmentation": 0}], "row 5 .* augmentation 0 in test"),
        ([*ROWS[:4], {**ROWS[0], "augmentation": 1.5}], "row 5 .* augmentation 1.5"),
        ([*ROWS[:4], {**ROWS[0], "augmentation": -1}], "row 5 .* augmentation -1"),
        ([*ROWS[:4], {**ROWS[0], "augmentation": 1}], r"augmentations \[.*\] of .*mp4, and .* of another.* 0 to"),
        ([{**ROWS[0], "augmentation": 0}, *ROWS[1:]], r"augmentations \[\] of .*hug/1.mp4, and 1 of another"),
        ([*ROWS[:4], {**ROWS[0], "label": "hug", "augmentation": 1}], "row 5 .* another label or split"),
        ([*ROWS[:4], {**ROWS[0], "group": "b", "augmentation": 1}], "row 5 .* another group"),
        ([*ROWS[:4], {**ROWS[4], "group": "a\nb"}], "row 5 .* group .* one line"),
        ([{**row, "group": n} for n, row in enumerate(ROWS)], "row 1 .* group 0: give a text"),
    ],
)
def test_a_row_at_fault_is_named(file: Path, rows: list[dict[str, Any]], said: str) -> None:
    save(file, rows, numbers())
    assert re.search(said, refusal(file))
    if all(row.keys() >= {"path", "label", "split"} for row in rows):  # what can't be read is not written
        file.unlink()
        assert re.search(said, refusal(file, lambda: write_feature_table(file, rows, numbers())))
        assert not any(file.parent.iterdir())


@pytest.mark.parametrize("name", ["path", "label"])
def test_texts_that_are_no_utf8_are_named(file: Path, name: str) -> None:
    """JSON can say them, and no Parquet file holds them; a digest of them would end a training later."""
    for text in ("a\ud800", "a\udcff"):
        rows = [*ROWS[:4], {**ROWS[4], name: text}]
        assert "UTF-8" in refusal(file, lambda rows=rows: write_feature_table(file, rows, numbers()))  # type: ignore[misc]
        save(file.with_suffix(".safetensors"), rows, numbers())
        assert "row 5 of" in refusal(file.with_suffix(".safetensors"))


def spoiled(row: int, frame: int, value: float) -> Tensor:
    features = numbers()
    features[row, frame] = value
    return features


@pytest.mark.parametrize(
    ("features", "said"),
    [
        (spoiled(2, 1, float("nan")), "row 3 of .*'train/wave/2.mp4', has values that are not finite"),
        (spoiled(4, 0, -float("inf")), "row 5 of .* not finite"),
        (spoiled(1, 2, 0.0), "row 2 of .*'train/hug/1.mp4', has a frame of zeros"),
        (numbers().double() * 1e39, "row 1 of .* too large for float32"),
        (numbers()[:, :0], r"shape \(5, 0, .\): give \(videos, frames, dim\)"),
        (numbers()[:, :, :0], r"shape \(5, 3, 0\)"),
        (numbers()[:, 0], r"shape \(5, 5\)|lists of lists of floating numbers"),
        (torch.ones(5, FRAMES, DIM, dtype=torch.int32), "int32"),
    ],
)
def test_features_at_fault_are_named(file: Path, features: Tensor, said: str) -> None:
    if file.suffix == ".parquet" and features.dtype == torch.int32:
        said = "floating numbers"
    save(file, ROWS, features)
    assert re.search(said, refusal(file))


def test_rows_of_other_sizes_are_named(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    for features, said in (
        ([[[1.0]] * 2] * 4 + [[[1.0]] * 3], "row 5 of the features of the feature table .* has 3 frames"),
        ([[[1.0, 2.0]] * 2] * 3 + [[[1.0, 2.0], [1.0]]] + [[[1.0, 2.0]] * 2], "row 4 .* has 1 numbers a frame"),
        ([[[1.0, 2.0]] * 2] * 3 + [[[1.0, 2.0], [1.0, None]]] + [[[1.0, 2.0]] * 2], "row 4 .* empty cell"),
        ([[[1.0]] * 2] * 4 + [None], "row 5 .* empty cell"),
        (["text"] * 5, "type string"),
    ):
        save(path, ROWS, features)
        assert re.search(said, refusal(path)), said
    # The same in a later row group.
    columns = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    pq.write_table(pa.table(columns | {"features": [[[1.0]] * 2] * 4 + [[[1.0]]]}), path, row_group_size=2)
    assert "row 5 " in refusal(path)
    save(tmp_path / "table.safetensors", ROWS, numbers(4))
    assert "5 rows and the features of 4" in refusal(tmp_path / "table.safetensors")


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (embeddings("wave", "hug", "zap"), "no embedding of 'eat (é)' and 0 more of the 4 classes"),
        (embeddings(dim=4), "have 4 numbers each, and the features"),
        (embeddings() | {"hug": torch.full((DIM,), float("nan"))}, "row 2 of"),
        (embeddings() | {"zap": torch.zeros(DIM)}, "'zap', has an embedding of zeros"),
        (embeddings() | {" ": torch.ones(DIM)}, "row 6 of"),
    ],
)
def test_class_embeddings_at_fault_are_named(file: Path, classes: dict[str, Tensor], said: str) -> None:
    save(file, ROWS, numbers(), classes)
    assert said in refusal(file)
    file.unlink()
    classes_file(file).unlink()
    assert said in refusal(file, lambda: write_feature_table(file, ROWS, numbers(), classes))


def test_classes_that_come_twice_are_named(tmp_path: Path) -> None:
    file = save(tmp_path / "table.parquet", ROWS, numbers())
    table = {"label": ["wave", "hug", "wave"], "embedding": [[1.0] * DIM] * 3}
    pq.write_table(pa.table(table), classes_file(file))
    assert "'wave' twice" in refusal(file)


def test_class_embeddings_that_are_not_read_are_named(file: Path) -> None:
    """Of another ending than the table, or behind a broken link."""
    write_feature_table(file, ROWS, numbers(), embeddings())
    beside = classes_file(file)
    other = next(s for s in (".safetensors", ".parquet") if s != file.suffix)
    beside.rename(file.with_suffix(f".classes{other}"))
    said = refusal(file)
    assert beside.name in said
    assert f".classes{other}" in said
    write_feature_table(file.with_suffix(other), ROWS, numbers(), embeddings())  # of which they are now
    assert not read_feature_table(file).class_embeddings
    beside.symlink_to("gone")
    assert "there is no file of class embeddings" in refusal(file)


def test_arrays_are_written_as_tensors_are(file: Path) -> None:
    classes = embeddings()
    write_feature_table(file, ROWS, numbers().numpy(), {label: e.numpy() for label, e in classes.items()})
    table = read_feature_table(file)
    assert table.features.equal(numbers())
    assert all(table.class_embeddings[label].equal(embedding) for label, embedding in classes.items())
    ragged = classes | {"hug": torch.ones(DIM + 1)}
    assert "several widths" in refusal(file, lambda: write_feature_table(file, ROWS, numbers(), ragged))
    words: Any = [[["a"]]]
    assert "no table of numbers" in refusal(file, lambda: write_feature_table(file, ROWS[:1], words))
    assert "no table of numbers" in refusal(file, lambda: write_feature_table(file, ROWS, numbers().to_sparse()))


def test_embeddings_that_another_table_left_are_not_taken(file: Path) -> None:
    write_feature_table(file, ROWS, numbers(), embeddings())
    said = refusal(file, lambda: write_feature_table(file, ROWS, numbers() + 1))
    assert "would be taken for its own" in said
    assert read_feature_table(file).features.equal(numbers())


def test_files_that_are_no_tables_are_named(tmp_path: Path) -> None:
    missing = tmp_path / "none.safetensors"
    assert "there is no feature table" in refusal(missing)
    weights = tmp_path / "weights.safetensors"
    save_file({"visual.proj": torch.ones(2)}, weights)
    assert "it needs the tensor 'features'" in refusal(weights)
    for rows in ("", "[", "[1]", '{"a": 1}', "[" * 10**5, "[" + "9" * 5000 + "]"):
        save_file({"features": numbers()}, weights, {"format": "clip-m2df feature table 1", "rows": rows})
        refusal(weights)
    table = tmp_path / "table.parquet"
    pq.write_table(pa.table({"path": ["a"], "features": [[[1.0]]]}), table)
    assert "has no column 'label'" in refusal(table)
    arrays = [pa.array([row[name]]) for row in ROWS[:1] for name in ("path", "label", "split")]
    pq.write_table(pa.table([*arrays, arrays[1]], names=["path", "label", "split", "label"]), table)
    assert "has no column 'features'" in refusal(table)
    for twice in ("label", "features"):
        columns = [*arrays, pa.array([[[1.0]]]), arrays[1] if twice == "label" else pa.array([[[1.0]]])]
        pq.write_table(pa.table(columns, names=["path", "label", "split", "features", twice]), table)
        assert f"has the column {twice!r} twice" in refusal(table)
    table.write_bytes(b"")
    assert "damaged, or no Parquet file" in refusal(table)
    pipe = tmp_path / "pipe.parquet"
    os.mkfifo(pipe)
    assert "not a regular file" in refusal(pipe)
    other = tmp_path / "table.npz"
    assert "ends in .safetensors or .parquet" in refusal(other, lambda: write_feature_table(other, ROWS, numbers()))


def test_a_table_that_is_larger_inside_than_outside_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    ones = pa.FixedSizeListArray.from_arrays(pa.array(torch.ones(5 * 2000 * 1000).numpy()), 1000)
    columns = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    table = pa.table(columns | {"features": pa.FixedSizeListArray.from_arrays(ones, 2000)})
    pq.write_table(table, path, compression="zstd")
    assert path.stat().st_size < 100_000
    assert "and features hardly compress" in refusal(path)


@pytest.mark.parametrize("which", ["table", "classes"])
def test_damaged_files_are_refused_or_read(file: Path, which: str) -> None:
    write_feature_table(file, ROWS, numbers(), embeddings())
    damaged = file if which == "table" else classes_file(file)
    content = damaged.read_bytes()
    rng = random.Random(0)
    for _ in range(150):
        damaged.write_bytes(damage(rng, content))
        with suppress(UserError):
            assert read_feature_table(file).features.isfinite().all()


def test_a_full_disk_leaves_what_was_there(file: Path) -> None:
    write_feature_table(file, ROWS, numbers(), embeddings())
    before = {path.name: path.read_bytes() for path in file.parent.iterdir()}
    rows = rows_of(*(f"train/wave/{i}.mp4" for i in range(1000)))
    with files_up_to(20000):
        refusal(file, lambda: write_feature_table(file, rows, numbers(1000), embeddings("wave")))
    assert {path.name: path.read_bytes() for path in file.parent.iterdir()} == before
    if file.suffix == ".safetensors":
        assert load_file(file)["features"].equal(numbers())
