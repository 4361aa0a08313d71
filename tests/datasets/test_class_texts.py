import unicodedata

import pytest

from clip_m2df.datasets.benchmarks import BENCHMARKS
from clip_m2df.datasets.manifest import class_key, fold, readable


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
