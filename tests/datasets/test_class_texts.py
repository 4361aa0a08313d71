import json
import os
import unicodedata
from pathlib import Path

import pytest

from clip_m2df.datasets.benchmarks import BENCHMARKS
from clip_m2df.datasets.manifest import Manifest, Video, class_key, fold, readable
from clip_m2df.errors import UserError
from tests.conftest import GOLDEN

PUBLISHED = json.loads((GOLDEN / "published_classes.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("label", "text"),
    [
        ("HandstandPushups", "handstand pushups"),
        ("YoYo", "yo yo"),
        ("CleanAndJerk", "clean and jerk"),
        ("BlowDryHair", "blow dry hair"),
        ("TVShow", "tv show"),
        ("draw_sword", "draw sword"),
        ("air drumming", "air drumming"),
        ("riding BMX_bike", "riding bmx bike"),
        ("hurling (sport)", "hurling sport"),
        ("Twisting (wringing) something wet", "twisting wringing something wet"),
        ("Pouring [something] into [something]", "pouring something into something"),
        ("Poking a hole into [something soft]", "poking a hole into something soft"),
        (
            "Pretending to pour [something] out of [something], but [something] is empty",
            "pretending to pour something out of something, but something is empty",
        ),
        ("massaging person's head", "massaging person's head"),
        ("  two   spaces\t", "two spaces"),
        ("jump(high)er", "jump high er"),
        ("Köpfen_ÜBEN", "köpfen üben"),
        ("___", "___"),
        ("[]", "[]"),
    ],
)
def test_a_prompt_says_plain_words(label: str, text: str) -> None:
    assert readable(label) == text
    assert readable(text) == text


def test_spellings_of_a_class_share_a_key() -> None:
    assert len({class_key(name) for name in ("HandstandPushups", "HandStandPushups", "handstand pushups")}) == 1
    assert class_key("hurling_(sport)") == class_key("Hurling (sport)")
    assert class_key("kick") != class_key("kick_ball")
    for benchmark in BENCHMARKS.values():
        labels = [label for names in benchmark.class_split.values() for label in names]
        assert len({class_key(label) for label in labels}) == len(labels)


def test_names_are_folded() -> None:
    composed = unicodedata.normalize("NFC", "Café Olé")
    assert fold(composed) == fold(unicodedata.normalize("NFD", composed).upper()) == "café_olé"
    assert fold("A b_C-d") == "a_b_c-d"


@pytest.mark.parametrize("dataset", ["hmdb51", "ucf101"])
def test_the_built_in_splits_have_the_published_numbers_of_classes(dataset: str) -> None:
    benchmark = BENCHMARKS[dataset]
    assert tuple(len(benchmark.class_split[split]) for split in ("train", "val", "test")) == benchmark.n_classes
    assert len({label for labels in benchmark.class_split.values() for label in labels}) == sum(benchmark.n_classes)


# The texts that come with the package


def manifest_of(labels: list[str]) -> Manifest:
    return Manifest(Video(f"/v/{label}.mp4", label, "train", readable(label)) for label in labels)


def prompts(manifest: Manifest) -> set[str]:
    """The prompts in small letters, which is how CLIP reads them."""
    return {f"a photo of {text}".lower() for text in manifest.split("train").class_texts}


@pytest.mark.parametrize("dataset", sorted(BENCHMARKS))
@pytest.mark.parametrize("brackets", [True, False])
def test_prompts_of_the_published_code(
    dataset: str, brackets: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    published = PUBLISHED[dataset]
    assert len(published) == sum(BENCHMARKS[dataset].n_classes[i] for i in (0, 2))
    spelled = {class_key(label): label for names in BENCHMARKS[dataset].class_split.values() for label in names}
    labels = [spelled.get(class_key(name), name) for name in published]
    if not brackets:  # as in lists that have the names in their lines
        labels = [label.replace("[", "").replace("]", "") for label in labels]
    own = manifest_of(labels)
    file = f"texts/published/{'ssv2' if dataset == 'ssv2_small' else dataset}.csv"
    expected = {f"a photo of {name}".lower() for name in published}
    assert prompts(own.with_texts(file)) == expected
    differ = {"hmdb51": 4, "kinetics100": 1, "ucf101": 2}.get(dataset, 88)
    assert len(expected - prompts(own)) == differ
    every = [f"texts/published/{name}.csv" for name in ("ssv2", "ucf101", "hmdb51", "kinetics100")]
    assert prompts(own.with_texts(every)) == expected


def test_files_of_class_texts_are_looked_for_here_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    name = os.path.join("texts", "published", "hmdb51.csv")
    manifest = manifest_of(["draw_sword", "ride_bike", "run"])
    assert manifest.with_texts(name).split("train").class_texts == ("draw_sword", "ride_bike", "run")
    (tmp_path / "own.csv").write_text("label,text\nRide Bike,cycling\nrun,running\n")
    assert manifest.with_texts([name, "own.csv"]).split("train").class_texts == ("draw_sword", "cycling", "running")
    assert manifest.with_texts(["own.csv", Path(name)]).split("train").class_texts == (
        "draw_sword",
        "ride_bike",
        "running",
    )
    (tmp_path / "texts" / "published").mkdir(parents=True)
    (tmp_path / name).write_text("label,text\ndraw_sword,fencing\n")
    assert manifest.with_texts(name).split("train").class_texts == ("fencing", "ride bike", "run")

    for missing in (
        "texts/published/hmdb.csv",
        "texts",
        "../texts/published/ssv2.csv",
        "texts/../demo_5way1shot.yaml",
        "",
    ):
        with pytest.raises(UserError, match=r"list of class texts"):
            manifest.with_texts([name, missing])
    with pytest.raises(UserError, match=r"relative names start at .*, and .*texts/published/ssv2\.csv.* come with"):
        manifest.with_texts("texts/published/hmdb.csv")
    message = r"class texts own.csv, texts/published/ssv2\.csv names no class of .*'jump'.*--data\.class_texts null"
    with pytest.raises(UserError, match=message):
        manifest_of(["jump"]).with_texts(["own.csv", "texts/published/ssv2.csv"])
