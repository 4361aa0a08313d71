"""The split lists in circulation, where CLIP_M2DF_SPLITS names a folder with trx/, cmn/ and clip_fsar/."""

import itertools
import json
import os
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from clip_m2df.cli import main
from clip_m2df.datasets.benchmarks import BENCHMARKS
from clip_m2df.datasets.manifest import SPLITS, Manifest, read_class_texts, readable
from clip_m2df.datasets.split_lists import SplitLists, read_lists
from clip_m2df.episodes.files import read_episodes_file
from clip_m2df.episodes.plan import EpisodeShape

SPLITS_FOLDER = Path(os.environ.get("CLIP_M2DF_SPLITS", ""))

pytestmark = pytest.mark.skipif("CLIP_M2DF_SPLITS" not in os.environ, reason="CLIP_M2DF_SPLITS is not set")

LISTS = [
    ("kinetics100", "trx/kinetics_CMN"),
    ("kinetics100", "cmn/kinetics-100"),
    ("kinetics100", "clip_fsar/kinetics100"),
    ("ssv2", "trx/ssv2_OTAM"),
    ("ssv2", "clip_fsar/ssv2_full"),
    ("ssv2_small", "trx/ssv2_CMN"),
    ("ssv2_small", "cmn/smsm-100"),
    ("ssv2_small", "clip_fsar/ssv2_small"),
    ("hmdb51", "trx/hmdb_ARN"),
    ("hmdb51", "clip_fsar/hmdb51"),
    ("ucf101", "trx/ucf_ARN"),
    ("ucf101", "clip_fsar/ucf101"),
]


@pytest.fixture(scope="module")
def annotations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in SSv2's form for the lists with numbers, with a made-up template for each number."""
    path = tmp_path_factory.mktemp("annotations") / "something-something-v2-train.json"
    small = {line.split("/")[1] for line in lines_of("clip_fsar/ssv2_small")}
    rows = {line.split("/")[1]: f"Doing [{line.split('/')[0]}]" for line in lines_of("clip_fsar/ssv2_full")}
    assert len(rows) == 71796
    assert len(small) == 10000
    path.write_text(json.dumps([{"id": video, "label": "x", "template": name} for video, name in rows.items()]))
    return path


@cache
def lines_of(folder: str) -> tuple[str, ...]:
    files = sorted((SPLITS_FOLDER / folder).iterdir())
    return tuple(line for file in files for line in file.read_text(encoding="utf-8").splitlines())


def read(dataset: str, folder: str, annotations: Path) -> SplitLists:
    """Read lists; SSv2 small's numbers come with names of their own, since both lists share videos."""
    if folder == "clip_fsar/ssv2_small":
        rows = [line.split("/") for line in lines_of(folder)]
        annotations = annotations.with_name("small.json")
        annotations.write_text(json.dumps([{"id": video, "template": f"Doing [{number}]"} for number, video in rows]))
    return read_lists(SPLITS_FOLDER / folder, dataset, [annotations] if dataset.startswith("ssv2") else [])


@pytest.mark.parametrize(("dataset", "folder"), LISTS)
def test_every_list_has_the_published_numbers(dataset: str, folder: str, annotations: Path) -> None:
    lists = read(dataset, folder, annotations)
    benchmark = BENCHMARKS[dataset]
    assert tuple(len(lists.classes[split]) for split in SPLITS) == benchmark.n_classes
    assert lists.videos is not None
    counts = Counter(video.split for video in lists.videos)
    assert tuple(counts[split] for split in SPLITS) == benchmark.n_videos
    assert len({label for labels in lists.classes.values() for label in labels}) == sum(benchmark.n_classes)
    for split, labels in benchmark.class_split.items():
        assert set(lists.classes[split]) == set(labels)
    assert all(readable(label).islower() for labels in lists.classes.values() for label in labels)


@pytest.mark.parametrize("dataset", ["hmdb51", "ucf101"])
def test_the_built_in_splits_give_the_manifests_of_the_lists(
    tmp_path: Path, dataset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "videos"
    for line in lines_of(f"clip_fsar/{dataset}"):
        label, name = line.split("/")[-2:]
        (root / label).mkdir(parents=True, exist_ok=True)
        (root / label / name).touch()
    output = tmp_path / "manifest.csv"

    def manifest(*options: str) -> bytes:
        assert main(["prepare", dataset, "--root", str(root), "--output", str(output), *options]) == 0
        return output.read_bytes()

    built_in = manifest()
    assert built_in.count(b"\n") == 1 + sum(BENCHMARKS[dataset].n_videos)
    for form in ("trx", "clip_fsar"):
        folder = next(folder for name, folder in LISTS if name == dataset and folder.startswith(form))
        assert manifest("--lists", str(SPLITS_FOLDER / folder)) == built_in
    assert "published" not in capsys.readouterr().out


TWINS = {("ucf101", 1): 3.4, ("ucf101", 5): 16.1, ("hmdb51", 1): 3.3, ("hmdb51", 5): 14.3}
"""The share of queries with a twin in random episodes, in percent, as counted from the lists by others."""


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["ucf101", "hmdb51", "kinetics100"])
def test_twins_are_counted_in_random_episodes_and_absent_from_grouped_ones(
    tmp_path: Path, dataset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root, manifest, output = tmp_path / "videos", tmp_path / "manifest.csv", tmp_path / "episodes.jsonl"
    folder = next(folder for name, folder in LISTS if name == dataset)
    for line in lines_of(folder):
        label, name = line.split("/")[-2:]
        (root / label).mkdir(parents=True, exist_ok=True)
        (root / label / f"{Path(name).stem}.avi").touch()
    lists = ["--lists", str(SPLITS_FOLDER / folder)]
    assert main(["prepare", dataset, "--root", str(root), "--output", str(manifest), *lists]) == 0
    split = Manifest.read(manifest, check_files=False).split("test")
    for n_shot, episodes in itertools.product((1, 3, 5), ("random", "grouped")):
        options = [f"--data.manifest={manifest}", f"--data.n_shot={n_shot}", f"--data.episodes={episodes}"]
        capsys.readouterr()
        assert main(["episodes", *options, f"--output={output}"]) == 0
        (said,) = re.findall(r"^(\d+) of their 50000 queries", capsys.readouterr().out, re.MULTILINE)
        plans = read_episodes_file(output, split, str(tmp_path), EpisodeShape(5, n_shot, 1))
        assert len(plans) == 10_000
        twins = sum(
            video.group in {shown.group for row in plan.support for shown in row}
            for plan in plans
            for video in itertools.chain(*plan.query)
        )
        assert twins == int(said)
        if episodes == "grouped" or dataset == "kinetics100":
            assert twins == 0
        elif (dataset, n_shot) in TWINS:
            assert twins / 500 == pytest.approx(TWINS[dataset, n_shot], abs=0.5)


@pytest.mark.parametrize(("dataset", "folder"), [entry for entry in LISTS if not entry[0].startswith("ssv2")])
def test_labels_of_the_lists_have_the_published_texts(dataset: str, folder: str, annotations: Path) -> None:
    names = json.loads((SPLITS_FOLDER / "clip_fsar" / "class_names.json").read_text(encoding="utf-8"))[dataset]
    classes = read(dataset, folder, annotations).classes
    texts = read_class_texts(f"texts/published/{dataset}.csv", classes["train"] + classes["test"], dataset)
    for split in ("train", "test"):
        said = {texts.get(label, readable(label)).lower() for label in classes[split]}
        assert said == {name.lower() for name in names[split]}


def test_kinetics_videos_are_found_by_their_ids(tmp_path: Path) -> None:
    """The tree is named as one list has it; CLIP-FSAR's leaves out time stamps and replaces some videos."""
    root, output = tmp_path / "videos", tmp_path / "manifest.csv"
    ids = set()
    for line in lines_of("trx/kinetics_CMN"):
        label, name = line.split("/")
        ids.add(name[:11])
        (root / label).mkdir(parents=True, exist_ok=True)
        (root / label / f"{name}.mp4").touch()
    manifests = {}
    for _, folder in LISTS[:3]:
        lists = ["--lists", str(SPLITS_FOLDER / folder)]
        assert main(["prepare", "kinetics100", "--root", str(root), "--output", str(output), *lists]) == 0
        manifests[folder] = output.read_text(encoding="utf-8").splitlines()
    assert manifests["trx/kinetics_CMN"] == manifests["cmn/kinetics-100"]
    assert len(manifests["trx/kinetics_CMN"]) == 1 + 10000
    found = [os.path.basename(row.split(",")[0])[:11] for row in manifests["clip_fsar/kinetics100"][1:]]
    listed = {line.split("/")[-1][:11] for line in lines_of("clip_fsar/kinetics100")}
    assert len(listed) == 10000
    assert sorted(found) == sorted(ids & listed)
    assert len(found) > 9700
