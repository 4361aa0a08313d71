"""From the files of a data set on disk to a test accuracy, through the shipped configs, for each of the five."""

import csv
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from clip_m2df.cli import main
from clip_m2df.datasets.manifest import Manifest
from tests import clips

VIDEOS = {"train": 10, "val": 6, "test": 6}  # of each class, what 5-shot episodes take


@dataclass
class Tree:
    """A data set on disk, and what is known of it.

    Attributes:
        root: where its videos are.
        lists: the folders of split lists, by the name of their form.
        annotations: files with class names.
        missing: names that the lists have and the disk doesn't.
        broken: names of files that are no video.
    """

    root: Path
    lists: dict[str, Path]
    annotations: list[Path] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Listed:
    """A video of a data set.

    Attributes:
        name: by which messages and tables tell it.
        lines: its line in the lists of either form.
        path: its file under the root; a folder of frames where it has no extension.
        content: what the file holds in the place of a video.
        missing: whether the file is missing.
    """

    name: str
    lines: tuple[str, str]
    path: str
    content: bytes | None = None
    missing: bool = False


@dataclass(frozen=True)
class DataSet:
    """The form of a data set.

    Attributes:
        classes: the labels of each split.
        texts: what prompts say of some of the classes.
        form: whose the lists of the first form are; those of the second form are CLIP-FSAR's.
        names: what the lists of the first form are called.
        listed: from a split, the number of a class, its label, the number of its video, and a number that no other
            video has, to the video.
        annotated: whether files tell the class of each video.
    """

    classes: dict[str, list[str]]
    texts: dict[str, str]
    form: str
    names: str
    listed: Callable[[str, int, str, int, int], Listed]
    annotated: bool = False

    def build(self, folder: Path, films: "Films") -> Tree:
        """Write the videos, the lists and the annotations."""
        tree = Tree(folder / "videos", {form: folder / form for form in (self.form, "CLIP-FSAR")})
        lines: dict[Path, list[str]] = defaultdict(list)
        notes: dict[Path, list[object]] = defaultdict(list)
        videos = [
            (split, c, label, v)
            for split, labels in self.classes.items()
            for c, label in enumerate(labels)
            for v in range(VIDEOS[split])
        ]
        for split, c, label, v in videos:
            video = self.listed(split, c, label, v, next(films.numbers))
            for form, name, line in zip(tree.lists, (self.names, "{}_few_shot.txt"), video.lines, strict=True):
                lines[tree.lists[form] / name.format(split)].append(line)
            note = {"id": video.name, "template": label, "placeholders": ["a cup"] * label.count("[")}
            notes[folder / f"something-something-v2-{'validation' if v % 2 else 'train'}.json"].append(note)
            if video.missing:
                tree.missing.append(video.name)
                continue
            films.put(tree.root / video.path)
            if video.content is not None:
                (tree.root / video.path).write_bytes(video.content)
                tree.broken.append(video.name)
        for path, entries in lines.items():
            path.parent.mkdir(exist_ok=True)
            path.write_text("\n".join(entries) + "\n", encoding="utf-8")
        if self.annotated:
            tree.annotations = list(notes)
            for path, content in notes.items():
                path.write_text(json.dumps(content), encoding="utf-8")
        return tree


class Films:
    """Small videos of each container and of several lengths, rendered when first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = itertools.count()
        self.numbers = itertools.count(50_000)  # of the videos of all data sets

    def put(self, path: Path) -> None:
        """Write a video, or a folder of frames where the path has no extension."""
        path.parent.mkdir(parents=True, exist_ok=True)
        n_frames = 3 + next(self.count) % 12
        if not path.suffix:
            clips.save_images(path, n_frames, size=(48, 32))
            return
        kind = ".mp4" if path.name.endswith(".mkv.mp4") else path.suffix.lower()
        source = self.folder / f"{n_frames}{kind}"
        if not source.exists():
            codec = {".avi": "mpeg4", ".webm": "libvpx-vp9"}.get(kind, "libx264")
            speed = {"cpu-used": "8"} if kind == ".webm" else {}
            clips.render(source, n_frames, codec, options=speed, size=(48, 32))
        path.write_bytes(source.read_bytes())


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Films:
    return Films(tmp_path_factory.mktemp("films"))


def hmdb51(split: str, c: int, label: str, v: int, number: int) -> Listed:
    oddities = ['"Quoted"', "(Rad)Schlag_die_Bank!", "Brushing_Her_Hair__[_NEW_AUDIO_]_UP!!!!", "-dash", "Größe;-)"]
    name = f"{oddities[v % 5]}_{label}_f_cm_np1_ba_med_{v}"
    lines = f"{label}/{name}", f"{split}{c}//videos/{label}/{name}.avi"
    content = b"no video" if (label, v) == ("pour", 0) else None
    return Listed(name, lines, f"{label}/{name}.avi", content, missing=(label, v) == ("catch", 3))


def ucf101(split: str, c: int, label: str, v: int, number: int) -> Listed:
    name = f"v_{label}_g{1 + v // 4:02}_c{1 + v % 4:02}"
    lines = f"{label}/{name}", f"{split}{c}//videos/{label}/{name}.avi"
    # The folder is spelt in both ways, and some have converted theirs.
    folder = label.replace("HandstandPushups", "HandStandPushups")
    path = f"{folder}/{name}{'.MP4' if label == 'Archery' else '.avi'}"
    # A test class could not spare one of its six.
    return Listed(name, lines, path, content=b"" if (label, v) == ("TaiChi", 1) else None)


def kinetics100(split: str, c: int, label: str, v: int, number: int) -> Listed:
    youtube = f"{'-' if v % 3 == 0 else '_'}{label[0]}Q{number:08}"
    stamped = f"{youtube}_{v:06}_{v + 10:06}"
    folder = label.replace(" ", "_")
    # Some entries of the second form lack the time stamps, some end twice.
    entry = f"{youtube}.mkv" if v == 1 else f"{youtube}.mkv.mp4" if v == 2 else f"{stamped}.mp4"
    path = f"{split}_256/{folder}/" + (f"{youtube}.mkv.mp4" if v == 2 else f"{stamped}.mp4")
    content = b"\0\0\0\x1cftypisom" + bytes(88) if (label, v) == ("busking", 2) else None
    lines = f"{label}/{stamped}", f"{split}{c}//train_256/{folder}/{entry}"
    return Listed(youtube, lines, path, content, missing=(label, v) == ("arm wrestling", 4))


def ssv2(split: str, c: int, label: str, v: int, number: int) -> Listed:
    content = b"\x1a\x45\xdf\xa3 webm, it says" if (split, c, v) == ("test", 0, 3) else None
    # Extracted frames, and a video that was converted.
    path = f"frames/{number}" if v == 0 else f"{number}{'.mp4' if v == 1 else '.webm'}"
    return Listed(str(number), (f"{split}{c}/{number}",) * 2, path, content, missing=(split, c, v) == ("train", 0, 5))


def ssv2_small(split: str, c: int, label: str, v: int, number: int) -> Listed:
    path = f"frames/{number}" if v == 2 else f"{v % 3}/{number}{'.mp4' if v == 1 else '.webm'}"
    lines = f"{label}/{number}", f"{split}{c}/{number}"
    content = bytes(3000) if (split, c, v) == ("val", 2, 0) else None
    return Listed(str(number), lines, path, content, missing=(label, v) == ("a, b", 7))


DATA_SETS = {
    "hmdb51": DataSet(
        {
            "train": ["brush_hair", "catch", "chew", "draw_sword", "flic_flac"],
            "val": ["cartwheel", "eat", "golf", "hit", "swing_baseball"],
            "test": ["fencing", "kick", "kick_ball", "pick", "pour"],
        },
        {"draw_sword": "draw sword"},
        "TRX",
        "{}list03.txt",
        hmdb51,
    ),
    "ucf101": DataSet(
        {
            "train": ["ApplyEyeMakeup", "Archery", "BlowDryHair", "TaiChi", "YoYo"],
            "val": ["ApplyLipstick", "CricketShot", "HammerThrow", "HandstandPushups", "HighJump"],
            "test": ["BlowingCandles", "CleanAndJerk", "CliffDiving", "CuttingInKitchen", "Diving"],
        },
        {"HandstandPushups": "handstand pushups", "CleanAndJerk": "clean and jerk", "YoYo": "yo yo"},
        "TRX",
        "{}list03.txt",
        ucf101,
    ),
    "kinetics100": DataSet(
        {
            "train": ["air drumming", "arm wrestling", "bowling", "catching or throwing baseball", "squat"],
            "val": ["baking cookies", "crossing river", "flying kite", "high kick", "javelin throw"],
            "test": ["blasting sand", "busking", "hurling (sport)", "ice skating", "tap dancing"],
        },
        {"hurling (sport)": "hurling sport"},
        "CMN",
        "{}.list",
        kinetics100,
    ),
    "ssv2": DataSet(
        {
            "train": [
                "Bending [something] until it breaks",
                "Poking [something] so lightly that it doesn't or almost doesn't move",
                "Pouring [something] into [something]",
                "Tipping [something] with [something in it] over, so [something in it] falls out",
                "Twisting (wringing) [something] wet until water comes out",
            ],
            "val": [f"Putting [something] {where} [something]" for where in ("behind", "into", "near", "on", "under")],
            "test": [f"Pretending to {what} [something]" for what in ("open", "close", "throw", "take", "squeeze")],
        },
        {
            "Tipping [something] with [something in it] over, so [something in it] falls out": (
                "tipping something with something in it over, so something in it falls out"
            ),
        },
        "OTAM",
        "{}list07.txt",
        ssv2,
        annotated=True,
    ),
    "ssv2_small": DataSet(
        {
            "train": ["Pouring something into something", "Piling something up", "Tearing it", "a, b", "Closing it"],
            "val": [f"Lifting up one end of something, {i}" for i in ("one", "two", "three", "four", "five")],
            "test": [f"Twisting (wringing) something {i}" for i in ("wet", "dry", "up", "down", "so it isn't")],
        },
        {"Twisting (wringing) something wet": "twisting wringing something wet"},
        "CMN",
        "{}.list",
        ssv2_small,
        annotated=True,
    ),
}


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as table:
        return list(csv.DictReader(table))


def same_name(path: str, names: list[str]) -> bool:
    return any(name in Path(path).name for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("name", DATA_SETS)
def test_from_files_on_disk_to_a_test_accuracy(
    name: str, films: Films, tmp_path: Path, tiny_clip_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data_set = DATA_SETS[name]
    tree = data_set.build(tmp_path, films)

    # prepare, with the lists of each form
    written: list[list[tuple[str, str]]] = []
    for lists in tree.lists.values():
        output, report = tmp_path / "manifests" / f"{len(written)}.csv", tmp_path / "missing.csv"
        args = ["prepare", name, f"--root={tree.root}", f"--lists={lists}", f"--output={output}", f"--report={report}"]
        if tree.annotations:
            args += ["--annotations", *map(str, tree.annotations)]
        assert main(args) == (1 if tree.missing else 0), capsys.readouterr()
        manifest = Manifest.read(output, tree.root)
        counts = {split: len(manifest.split(split).class_names) for split in VIDEOS}
        assert counts == {"train": 5, "val": 5, "test": 5}
        assert len(manifest.videos) == 5 * (10 + 6 + 6) - len(tree.missing)
        missing = [row for row in rows(report) if row["problem"] == "missing"]
        assert len(missing) == len(tree.missing)
        assert all(same_name(row["entry"], tree.missing) for row in missing)
        written.append(sorted((video.path, video.split) for video in manifest.videos))
    assert all(videos == written[0] for videos in written)
    manifest = Manifest.read(tmp_path / "manifests" / "0.csv", tree.root)
    assert {v.label for v in manifest.videos} == {label for labels in data_set.classes.values() for label in labels}
    texts = {video.label: video.text for video in manifest.videos}
    assert data_set.texts.items() <= texts.items()

    # check, and a manifest without what is broken
    fixed = tmp_path / "manifests" / "fixed.csv"
    args = ["check", f"--manifest={tmp_path / 'manifests' / '0.csv'}", f"--fix={fixed}", "--workers=1", "--frames=2"]
    assert main(args) == 1
    said = capsys.readouterr().out
    assert "not one video is there" in said
    assert "with --root" in said
    assert main([*args, f"--root={tree.root}"]) == (1 if tree.broken else 0)
    table = rows(tmp_path / "manifests" / "0.check.csv")
    assert len(table) == len(manifest.videos)
    unusable = [row["path"] for row in table if row["status"] == "unusable"]
    assert len(unusable) == len(tree.broken)
    assert all(same_name(path, tree.broken) for path in unusable)
    assert len(Manifest.read(fixed, tree.root).videos) == len(manifest.videos) - len(tree.broken)

    # fit and test
    run = [
        # UCF101's goes through the other config, with frames from a cache and workers.
        f"--config={name}_5way{5 if name == 'ucf101' else 1}shot.yaml",
        f"--model.backbone={tiny_clip_dir}",
        "--model.head_options.hidden_dim=32",
        "--model.head_options.num_heads=4",
        f"--data.manifest={fixed}",
        f"--data.root={tree.root}",
        "--data.frames=2",
        "--data.resize=32",
        "--data.size=32",
        "--data.n_query=2",
        "--data.episodes_per_step=2",
        "--data.val_episodes=2",
        "--data.test_episodes=3",
        f"--data.num_workers={1 if name == 'ucf101' else 0}",
        "--trainer.max_steps=1",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        f"--trainer.default_root_dir={tmp_path / 'run'}",
    ]
    if name == "ucf101":
        folder = tmp_path / "cache"
        sizes = ["--short_side=32", "--frames=6", "--workers=1"]
        assert main(["cache", f"--manifest={fixed}", f"--root={tree.root}", f"--output={folder}", *sizes]) == 0
        run.append(f"--data.cache={folder}")
    assert main(["fit", *run, "--trainer.fast_dev_run=true"]) == 0
    assert not list((tmp_path / "run").rglob("*.ckpt"))
    assert main(["fit", *run]) == 0
    capsys.readouterr()
    assert main(["test", *run, "--ckpt_path=last"]) == 0
    said = capsys.readouterr().out
    assert "test/accuracy" in said

    # the test episodes, for others and from others
    episodes = tmp_path / "episodes.jsonl"
    assert main(["episodes", *run, f"--output={episodes}"]) == 0
    lines = [json.loads(line) for line in episodes.read_text(encoding="utf-8").splitlines()]
    assert Counter(len(line["support"]) for line in lines) == {5: 3}
    capsys.readouterr()
    assert main(["test", *run, "--ckpt_path=last", f"--data.episodes_file={episodes}"]) == 0
    assert accuracy(capsys.readouterr().out) == accuracy(said)


def accuracy(said: str) -> list[str]:
    return [line for line in said.splitlines() if "test/" in line]
