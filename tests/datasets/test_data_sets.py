"""From the files of a data set on disk to a test accuracy, through the shipped configs, for each of the five."""

import csv
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
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
        lists: the split lists of each form, by name; empty where the splits are built in.
        classes: the labels of each split.
        texts: what prompts say of some of the classes.
        annotations: files with class names.
        missing: names that the lists have and the disk doesn't.
        broken: names of files that are no video.
    """

    root: Path
    lists: dict[str, Path] = field(default_factory=dict)
    classes: dict[str, list[str]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    annotations: list[Path] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


class Films:
    """Small videos of each container, each with a length of its own, rendered when first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = itertools.count()

    def put(self, path: Path) -> None:
        """Write a video, or a folder of frames where the path has no extension."""
        path.parent.mkdir(parents=True, exist_ok=True)
        n_frames = 3 + next(self.count) % 12
        if not path.suffix:
            path.mkdir()
            for k in range(n_frames):
                clips.save_image(path / f"img_{k + 1:05}.jpg", k, size=(48, 32))
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


def no_lines(name: str) -> dict[str, list[str]]:
    """The lists of the three splits, by file name, still empty."""
    return {name.format(split): [] for split in VIDEOS}


def write_lists(folder: Path, lists: Mapping[str, list[str]]) -> Path:
    folder.mkdir(parents=True)
    for name, lines in lists.items():
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def videos_of(classes: Mapping[str, list[str]]) -> Iterator[tuple[str, int, str, int]]:
    """Split, class number, class and video number of each video."""
    for split, labels in classes.items():
        for c, label in enumerate(labels):
            for v in range(VIDEOS[split]):
                yield split, c, label, v


def hmdb51(folder: Path, films: Films) -> Tree:
    classes = {
        "train": ["brush_hair", "catch", "chew", "draw_sword", "flic_flac"],
        "val": ["cartwheel", "eat", "golf", "hit", "swing_baseball"],
        "test": ["fencing", "kick", "kick_ball", "pick", "pour"],
    }
    tree = Tree(folder / "HMDB51", classes=classes, texts={"draw_sword": "draw sword"})
    oddities = [
        '"Quoted"',
        "(Rad)Schlag_die_Bank!",
        "Brushing_Her_Hair__[_NEW_AUDIO_]_UPDATED!!!!",
        "-dash",
        "Größe;-)",
    ]
    trx, fsar = no_lines("{}list03.txt"), no_lines("{}_few_shot.txt")
    for split, c, label, v in videos_of(classes):
        name = f"{oddities[v % 5]}_{label}_f_cm_np1_ba_med_{v}"
        trx[f"{split}list03.txt"].append(f"{label}/{name}")
        fsar[f"{split}_few_shot.txt"].append(f"{split}{c}//videos/{label}/{name}.avi")
        if (label, v) == ("pour", 0):
            (tree.root / label).mkdir(parents=True)
            (tree.root / label / f"{name}.avi").write_bytes(b"no video")
            tree.broken.append(name)
        elif (label, v) == ("catch", 3):
            tree.missing.append(name)
        else:
            films.put(tree.root / label / f"{name}.avi")
    tree.lists = {"TRX": write_lists(folder / "trx", trx), "CLIP-FSAR": write_lists(folder / "fsar", fsar)}
    return tree


def ucf101(folder: Path, films: Films) -> Tree:
    classes = {
        "train": ["ApplyEyeMakeup", "Archery", "BlowDryHair", "TaiChi", "YoYo"],
        "val": ["ApplyLipstick", "CricketShot", "HammerThrow", "HandstandPushups", "HighJump"],
        "test": ["BlowingCandles", "CleanAndJerk", "CliffDiving", "CuttingInKitchen", "Diving"],
    }
    texts = {"HandstandPushups": "handstand pushups", "CleanAndJerk": "clean and jerk", "YoYo": "yo yo"}
    tree = Tree(folder / "UCF-101", classes=classes, texts=texts)
    trx, fsar = no_lines("{}list03.txt"), no_lines("{}_few_shot.txt")
    for split, c, label, v in videos_of(classes):
        name = f"v_{label}_g{1 + v // 4:02}_c{1 + v % 4:02}"
        trx[f"{split}list03.txt"].append(f"{label}/{name}")
        fsar[f"{split}_few_shot.txt"].append(f"{split}{c}//videos/{label}/{name}.avi")
        # The folder is spelt in both ways, and some have converted theirs.
        place = tree.root / label.replace("HandstandPushups", "HandStandPushups")
        if (label, v) == ("TaiChi", 1):  # a test class could not spare one of its six
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{name}.avi").touch()
            tree.broken.append(name)
        else:
            films.put(place / f"{name}{'.MP4' if label == 'Archery' else '.avi'}")
    tree.lists = {"TRX": write_lists(folder / "trx", trx), "CLIP-FSAR": write_lists(folder / "fsar", fsar)}
    return tree


def kinetics100(folder: Path, films: Films) -> Tree:
    classes = {
        "train": ["air drumming", "arm wrestling", "bowling", "catching or throwing baseball", "squat"],
        "val": ["baking cookies", "crossing river", "flying kite", "high kick", "javelin throw"],
        "test": ["blasting sand", "busking", "hurling (sport)", "ice skating", "tap dancing"],
    }
    tree = Tree(folder / "k400", classes=classes, texts={"hurling (sport)": "hurling sport"})
    cmn, fsar = no_lines("{}.list"), no_lines("{}_few_shot.txt")
    for split, c, label, v in videos_of(classes):
        number = next(films.count)
        youtube = f"{'-' if v % 3 == 0 else '_'}{label[0]}Q{number:08}"
        stamped = f"{youtube}_{v:06}_{v + 10:06}"
        cmn[f"{split}.list"].append(f"{label}/{stamped}")
        place = label.replace(" ", "_")
        # Some entries of this form lack the time stamps, some end twice.
        entry = f"{youtube}.mkv" if v == 1 else f"{youtube}.mkv.mp4" if v == 2 else f"{stamped}.mp4"
        fsar[f"{split}_few_shot.txt"].append(f"{split}{c}//train_256/{place}/{entry}")
        if (label, v) == ("arm wrestling", 4):
            tree.missing.append(youtube)
            continue
        path = tree.root / f"{split}_256" / place / (f"{youtube}.mkv.mp4" if v == 2 else f"{stamped}.mp4")
        films.put(path)
        if (label, v) == ("busking", 2):
            path.write_bytes(path.read_bytes()[:100])
            tree.broken.append(youtube)
    tree.lists = {"CMN": write_lists(folder / "cmn", cmn), "CLIP-FSAR": write_lists(folder / "fsar", fsar)}
    return tree


def ssv2(folder: Path, films: Films) -> Tree:
    classes = {
        "train": [
            "Bending [something] until it breaks",
            "Poking [something] so lightly that it doesn't or almost doesn't move",
            "Pouring [something] into [something]",
            "Tipping [something] with [something in it] over, so [something in it] falls out",
            "Twisting (wringing) [something] wet until water comes out",
        ],
        "val": [f"Putting [something] {where} [something]" for where in ("behind", "into", "next to", "onto", "under")],
        "test": [f"Pretending to {what} [something]" for what in ("open", "close", "throw", "take", "squeeze")],
    }
    texts = {
        "Pouring [something] into [something]": "pouring something into something",
        "Tipping [something] with [something in it] over, so [something in it] falls out": (
            "tipping something with something in it over, so something in it falls out"
        ),
    }
    tree = Tree(folder / "20bn", classes=classes, texts=texts)
    otam, fsar = no_lines("{}list07.txt"), no_lines("{}_few_shot.txt")
    notes: dict[str, list[object]] = {"train": [], "validation": []}
    for split, c, label, v in videos_of(classes):
        number = str(1000 + next(films.count))
        otam[f"{split}list07.txt"].append(f"{split}{c}/{number}")
        fsar[f"{split}_few_shot.txt"].insert(0, f"{split}{c}/{number}")
        placeholders = ["a cup"] * label.count("[")
        note = {"id": number, "label": "a cup, somewhere", "template": label, "placeholders": placeholders}
        notes["validation" if v % 2 else "train"].append(note)
        if v == 0:  # extracted frames, and a video that was converted
            films.put(tree.root / "frames" / number)
        elif (label, v) == (classes["test"][0], 3):
            tree.root.mkdir(exist_ok=True)
            (tree.root / f"{number}.webm").write_bytes(b"\x1a\x45\xdf\xa3 webm, it says")
            tree.broken.append(number)
        elif (label, v) == (classes["train"][0], 5):
            tree.missing.append(number)
        else:
            films.put(tree.root / f"{number}{'.mp4' if v == 1 else '.webm'}")
    tree.lists = {"OTAM": write_lists(folder / "otam", otam), "CLIP-FSAR": write_lists(folder / "fsar", fsar)}
    for name, content in notes.items():
        tree.annotations.append(folder / f"something-something-v2-{name}.json")
        tree.annotations[-1].write_text(json.dumps(content), encoding="utf-8")
    return tree


def ssv2_small(folder: Path, films: Films) -> Tree:
    classes = {
        "train": ["Pouring something into something", "Piling something up", "Tearing something", "a, b", "Closing it"],
        "val": [f"Lifting up one end of something, {i}" for i in ("one", "two", "three", "four", "five")],
        "test": [f"Twisting (wringing) something {i}" for i in ("wet", "dry", "up", "down", "so it isn't")],
    }
    texts = {"Twisting (wringing) something wet": "twisting wringing something wet"}
    tree = Tree(folder / "ssv2", classes=classes, texts=texts)
    cmn, fsar = no_lines("{}.list"), no_lines("{}_few_shot.txt")
    notes = []
    for split, c, label, v in videos_of(classes):
        number = str(50000 + next(films.count))
        cmn[f"{split}.list"].append(f"{label}/{number}")
        fsar[f"{split}_few_shot.txt"].append(f"{split}{c}/{number}")
        notes.append({"id": number, "label": "something", "template": label, "placeholders": []})
        if (label, v) == ("a, b", 7):
            tree.missing.append(number)
        elif v == 2:
            films.put(tree.root / "frames" / number)
        else:
            films.put(tree.root / str(v % 3) / f"{number}{'.mp4' if v == 1 else '.webm'}")
        if (label, v) == (classes["val"][2], 0):
            (tree.root / "0" / f"{number}.webm").write_bytes(b"\0" * 3000)
            tree.broken.append(number)
    tree.lists = {"CMN": write_lists(folder / "cmn", cmn), "CLIP-FSAR": write_lists(folder / "fsar", fsar)}
    tree.annotations = [folder / "something-something-v2-train.json"]
    tree.annotations[0].write_text(json.dumps(notes), encoding="utf-8")
    return tree


BUILD: dict[str, Callable[[Path, Films], Tree]] = {
    "hmdb51": hmdb51,
    "ucf101": ucf101,
    "kinetics100": kinetics100,
    "ssv2": ssv2,
    "ssv2_small": ssv2_small,
}


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as table:
        return list(csv.DictReader(table))


def same_name(path: str, names: list[str]) -> bool:
    return any(name in Path(path).name for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILD)
def test_from_files_on_disk_to_a_test_accuracy(
    name: str, films: Films, tmp_path: Path, tiny_clip_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = BUILD[name](tmp_path, films)

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
    assert {v.label for v in manifest.videos} == {label for labels in tree.classes.values() for label in labels}
    texts = {video.label: video.text for video in manifest.videos}
    assert tree.texts.items() <= texts.items()

    # check, and a manifest without what is broken
    fixed = tmp_path / "manifests" / "fixed.csv"
    args = ["check", f"--manifest={tmp_path / 'manifests' / '0.csv'}", f"--fix={fixed}", "--workers=1", "--frames=2"]
    assert main(args) == 2
    assert f"--data.root {tree.root} (clip-m2df check and cache: --root)" in capsys.readouterr().err
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
