"""``clip-m2df encode``, and trainings from its tables."""

import csv
import itertools
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from clip_m2df import CLIPM2DF, EpisodeDataModule
from clip_m2df.cli import main
from clip_m2df.datasets.feature_tables import read_feature_table
from clip_m2df.datasets.manifest import Manifest
from tests import clips
from tests.clip.towers import save_folder
from tests.conftest import fails, quiet_trainer
from tests.conftest import options as run_of

READING = ["--frames=2", "--resize=32", "--resize_mode=short_side", "--workers=0"]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of 24 training videos, so that they are encoded in two blocks, and of 15 of val and of test."""
    folder = tmp_path_factory.mktemp("many")
    lines = ["path,label,split,text"]
    for split, c, v in itertools.product(("train", "val", "test"), range(3), range(8)):
        if split == "train" or v < 5:
            name = f"{split}/{(c + v) % 5}/{c}_{v}.mp4"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            clips.render(folder / name, n_frames=7 + 3 * c + v, size=(48, 40))
            lines.append(f"{name},{split} {c},{split},what {split} {c} says")
    (folder / "m.csv").write_text("\n".join([lines[0], *sorted(lines[1:], key=lambda line: line[::-1])]))
    return folder / "m.csv"


def encode(manifest: Path, tower: Path, output: Path, *more: str) -> int:
    return main(["encode", f"--manifest={manifest}", f"--backbone={tower}", f"--output={output}", *READING, *more])


def logged(run: Path) -> list[dict[str, str]]:
    """All that a run logged."""
    (file,) = run.glob("lightning_logs/version_*/metrics.csv")
    with file.open() as lines:
        return list(csv.DictReader(lines))


def head_of(run: Path, name: str = "last") -> dict[str, Tensor]:
    state: dict[str, Any] = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]
    return {key: weight for key, weight in state.items() if key.startswith("model.head.")}


def test_a_head_trains_from_the_table_as_from_the_videos(many: Path, tiny_clip_dir: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.safetensors"
    assert encode(many, tiny_clip_dir, table, "--augmentations=1", "--seed=7", "--flip") == 0
    given: dict[str, Any] = {"n_way": 3, "n_query": 2, "frames": 2, "num_workers": 0, "seed": 7, "episodes_per_step": 2}
    given |= {"validate_every": 2, "val_episodes": 40, "resize": 32, "size": 32, "flip": True}
    found = []
    for manifest, backbone, augmentations in ((many, str(tiny_clip_dir), 1), (table, "features", 0)):
        torch.manual_seed(0)
        options: dict[str, Any] = {"head_options": {"hidden_dim": 32, "num_heads": 4}, "class_weight": 0.5, "lr": 1e-3}
        options |= {"freeze_backbone": True, "backbone_options": {"dim": 32} if manifest == table else None}
        model = CLIPM2DF(backbone, **options)
        data = EpisodeDataModule(str(manifest), resize_mode="short_side", train_augmentations=augmentations, **given)
        trainer = quiet_trainer(tmp_path, max_steps=4, log_every_n_steps=1, logger=CSVLogger(tmp_path / backbone[-8:]))
        trainer.fit(model, data)
        (metrics,) = (tmp_path / backbone[-8:]).rglob("metrics.csv")
        found.append((metrics.read_text(), model.model.head.state_dict()))
    (of_videos, weights), (of_table, found_weights) = found
    assert of_videos == of_table
    assert "train/loss/class" in of_table.splitlines()[0]
    assert all(weight.equal(found_weights[name]) for name, weight in weights.items())


def test_the_table_says_what_videos_were_cut_from(many: Path, tiny_clip_dir: Path, tmp_path: Path) -> None:
    head, *lines = many.read_text().splitlines()
    grouped = many.with_name("grouped.csv")
    groups = [f"g{n % 4}" if n % 3 else "" for n in range(len(lines))]
    grouped.write_text("\n".join([f"{head},group", *map(",".join, zip(lines, groups, strict=True))]))
    table = tmp_path / "table.safetensors"
    assert encode(grouped, tiny_clip_dir, table, "--augmentations=2") == 0
    told = {video.label + Path(video.path).name: video.group for video in Manifest.read(grouped).videos}
    found = {video.label + Path(video.path).name: video.group for video in read_feature_table(table).manifest.videos}
    assert found == told


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["safetensors", "parquet"])
@pytest.mark.parametrize(
    ("augmentations", "reads", "trains"),
    [
        (1, [], []),
        (2, ["--sampling=random_segments", "--eval_seed=5"], ["--data.sampling=random_segments", "--data.eval_seed=5"]),
        (1, ["--precision=bf16-mixed"], ["--trainer.precision=bf16-mixed"]),
        (1, ["--template", "a {}", "{}!"], ['--model.template=["a {}", "{}!"]']),
    ],
)
def test_a_training_from_the_table_is_that_from_the_videos(
    many: Path,
    tiny_clip_dir: Path,
    tmp_path: Path,
    ending: str,
    augmentations: int,
    reads: list[str],
    trains: list[str],
) -> None:
    if ending == "parquet" and (reads or augmentations > 1):
        pytest.skip("the numbers that Parquet holds are those of safetensors")
    table = tmp_path / f"table.{ending}"
    assert encode(many, tiny_clip_dir, table, f"--augmentations={augmentations}", "--seed=7", "--flip", *reads) == 0
    # Episodes that name all videos: then the same go through the tower together.
    common = ["--data.seed=7", "--data.flip=true", "--model.lr=0.001", "--trainer.max_steps=4", *trains]
    common += ["--trainer.log_every_n_steps=1", "--data.val_episodes=40", "--data.test_episodes=40"]
    videos = ["--model.freeze_backbone=true", f"--data.train_augmentations={augmentations}"]
    assert main(["fit", *run_of(many, tiny_clip_dir, tmp_path / "videos", *common, *videos)]) == 0
    own = ["--model.backbone=features", "--model.freeze_backbone=false"]
    assert main(["fit", *run_of(table, tiny_clip_dir, tmp_path / "table", *common, *own)]) == 0

    ours, theirs = logged(tmp_path / "table"), logged(tmp_path / "videos")
    assert ours == theirs
    assert {"train/loss/total", "val/accuracy", "val/loss/total", "val/interval"} <= ours[0].keys()
    assert len(ours) >= 4
    for name in ("last", "best"):
        weights, expected = head_of(tmp_path / "table", name), head_of(tmp_path / "videos", name)
        assert weights.keys() == expected.keys()
        assert all(weight.equal(expected[key]) for key, weight in weights.items())
    # A test of both says the same.
    found = []
    for run, manifest in ((tmp_path / "videos", many), (tmp_path / "table", table)):
        config = ["--config", str(run / "config.yaml"), f"--ckpt_path={run / 'checkpoints' / 'best.ckpt'}"]
        assert main(["test", *config, f"--data.manifest={manifest}"]) == 0
        found.append((run / "test_metrics.csv").read_text())
    assert found[0] == found[1]


def test_the_table_has_what_the_tower_makes_of_each_video(many: Path, tiny_clip_dir: Path, tmp_path: Path) -> None:
    """Against each video read and encoded by itself, with the draws that a training takes."""
    table_file = tmp_path / "t.safetensors"
    assert encode(many, tiny_clip_dir, table_file, "--augmentations=3", "--seed=1") == 0
    table = read_feature_table(table_file)
    paths = [os.path.relpath(video.path, table.manifest.root) for video in table.manifest.videos]
    manifest = Manifest.read(many)
    assert sorted(paths) == sorted(os.path.relpath(video.path, many.parent) for video in manifest.videos)
    model = CLIPM2DF(str(tiny_clip_dir), freeze_backbone=True)
    given: dict[str, Any] = {"frames": 2, "resize": 32, "size": 32, "n_way": 3, "num_workers": 0, "seed": 1}
    data = EpisodeDataModule(str(many), train_augmentations=3, val_episodes=1, **given)
    data.setup("fit")
    training: Any = data.train_dataloader().dataset
    assert table.augmentations == 3
    with torch.no_grad():
        for index in (0, 1, 40, 71):
            video = training.videos[index]
            path = str(tmp_path / os.path.relpath(video.path, many.parent))
            expected = model.model.encode_frames(training.read(index).unsqueeze(0))[0]
            # Alone, and not in a block of 16.
            torch.testing.assert_close(table.of([(path, index % 3)])[0], expected, rtol=0, atol=1e-5)
        for video in (manifest.split("val").videos[1][2], manifest.split("test").videos[0][0]):
            expected = model.model.encode_frames(data.reader.read(video.path)[0].unsqueeze(0))[0]
            path = str(tmp_path / os.path.relpath(video.path, many.parent))
            torch.testing.assert_close(table.of([(path, 0)])[0], expected, rtol=0, atol=1e-5)
        for split in manifest.splits.values():
            prompts = model.encode_prompts(split.class_texts)
            for label, prompt in zip(split.class_names, prompts, strict=True):
                assert table.class_embeddings[label].equal(prompt)


def test_towers_of_trained_models_read_as_in_their_training(
    fitted: Path, manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, output = fitted / "checkpoints" / "best.ckpt", tmp_path / "t.safetensors"
    arguments = ["encode", f"--manifest={manifest}", f"--ckpt_path={checkpoint}", f"--output={output}", "--workers=0"]
    assert main(arguments) == 0
    table = read_feature_table(output)
    assert (table.frames, table.dim, table.augmentations) == (2, 32, 0)
    model = CLIPM2DF.load_from_checkpoint(checkpoint).eval()
    video = table.manifest.split("test").videos[0][0]
    data = EpisodeDataModule(str(manifest), frames=2, resize=32, resize_mode="short_side", size=32)
    clip = data.reader.read(str(manifest.parent / os.path.relpath(video.path, tmp_path)))[0]
    with torch.no_grad():
        expected = model.model.encode_frames(clip.unsqueeze(0))[0]
    torch.testing.assert_close(table.of([(video.path, 0)])[0], expected, rtol=0, atol=1e-5)
    # The model itself is tested on its features: the numbers of the videos.
    found = []
    for source in (manifest, output):
        run = tmp_path / source.stem
        more = [f"--ckpt_path={checkpoint}", "--data.size=null", "--data.test_episodes=40"]
        config = ["--config", str(fitted / "config.yaml"), f"--trainer.default_root_dir={run}"]
        assert main(["test", *config, f"--data.manifest={source}", *more]) == 0
        found.append((run / "test_metrics.csv").read_text())
    assert found[0] == found[1]
    assert "--size" not in capsys.readouterr().err
    assert "size is 64" in fails([*arguments, "--size=64"], capsys)


def test_what_is_to_be_typed_next_works_without_class_embeddings(
    many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_folder("dinov2", tmp_path / "tower")
    assert encode(many, tmp_path / "tower", tmp_path / "t.safetensors") == 0
    (command,) = re.findall("  clip-m2df (.*)", capsys.readouterr().out)
    assert (
        main(
            [
                *command.split(),
                "--data.n_way=3",
                "--data.test_episodes=20",
                f"--trainer.default_root_dir={tmp_path / 'run'}",
            ]
        )
        == 0
    )
    assert (tmp_path / "run" / "test_metrics.csv").is_file()


def test_broken_videos_are_named_and_left_out(
    many: Path, tiny_clip_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(many.parent, tmp_path / "m")
    broken = (
        sorted((tmp_path / "m" / "train").rglob("1_*.mp4"))[:2] + sorted((tmp_path / "m" / "val").rglob("*.mp4"))[:1]
    )
    for path in broken:
        path.write_bytes(b"no video")
    output = tmp_path / "t.safetensors"
    with pytest.warns(UserWarning, match="it is left out"):
        status = encode(tmp_path / "m" / "m.csv", tiny_clip_dir, output, "--augmentations=2")
    assert status == 1
    said = capsys.readouterr().out
    assert "not in the table: 3" in said
    assert all(str(path.relative_to(tmp_path / "m")) in said for path in broken)
    table = read_feature_table(output)
    left = {os.path.relpath(video.path, tmp_path) for video in table.manifest.videos}
    assert left == {v.path.removeprefix(f"{many.parent}/") for v in Manifest.read(many).videos} - {
        str(path.relative_to(tmp_path / "m")) for path in broken
    }
    assert len(table.features) == 2 * 22 + 14 + 15


def test_what_can_not_be_encoded_is_said_before(
    many: Path, tiny_clip_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "t.safetensors"
    given = ["encode", f"--manifest={many}", f"--output={output}", *READING]
    tower = f"--backbone={tiny_clip_dir}"
    assert "give the towers" in fails(given, capsys)
    assert "ends in .safetensors or .parquet" in fails([*given, tower, "--output=t.npz"], capsys)
    assert "augmentations is -1" in fails([*given, tower, "--augmentations=-1"], capsys)
    assert "has no tower" in fails([*given, "--backbone=features", "--backbone_options", "dim=4"], capsys)
    assert "no manifest" in fails([*given, tower, f"--manifest={tmp_path / 'none.csv'}"], capsys)
    assert "feature table already" in fails([*given, tower, "--manifest=x.parquet"], capsys)
    assert not list(tmp_path.iterdir())
    for path in many.parent.rglob("*.mp4"):
        copy = tmp_path / "broken" / path.relative_to(many.parent)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(b"")
    shutil.copy(many, tmp_path / "broken")
    with pytest.warns(UserWarning, match="left out"):
        said = fails([*given, tower, f"--manifest={tmp_path / 'broken' / 'm.csv'}"], capsys)
    assert "not one of the videos can be read" in said
    assert not output.exists()


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, 130)])
def test_a_run_that_is_ended_leaves_what_was_there(
    many: Path, tiny_clip_dir: Path, tmp_path: Path, signum: int, status: int
) -> None:
    output = tmp_path / "t.safetensors"
    assert encode(many, tiny_clip_dir, output) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    blocks: list[int] = []

    def end(module: nn.Module, *_: object) -> None:
        if isinstance(module, nn.Conv2d):  # the first layer of the visual tower
            blocks.append(1)
            if len(blocks) == 2:
                signal.raise_signal(signum)

    # A shell starts what is in the background with SIGINT ignored.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    hook = nn.modules.module.register_module_forward_hook(end)
    try:
        assert encode(many, tiny_clip_dir, output, "--augmentations=2") == status
    finally:
        hook.remove()
        signal.signal(signal.SIGINT, handler)
    assert len(blocks) == 2
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
