"""FewShotClassifier: what it takes and says, and that it says what an episode says."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from clip_m2df import CLIPM2DF, Episode, FewShotClassifier, NotFittedError, UserError
from clip_m2df.datasets.manifest import Split, Video
from clip_m2df.episode import ResizeMode
from clip_m2df.episodes.dataset import EpisodeDataset
from clip_m2df.episodes.plan import EpisodePlan, EpisodeShape
from clip_m2df.nn.baselines import HEADS
from clip_m2df.nn.class_text import fuse_text
from clip_m2df.video.reader import read_frames
from clip_m2df.video.transforms import ClipReader
from tests.classifier.conftest import Make, make_model, noise, plain_model


@pytest.fixture
def classifier(make: Make) -> FewShotClassifier:
    return make("otam").fit({"run": [noise(0), noise(1)], "eat": noise(2), "jump": [noise(3)]})


def probabilities(classifier: FewShotClassifier) -> np.ndarray[Any, Any]:
    """Of some clips, by the classes in the order of their names."""
    found = classifier.predict_proba([noise(seed) for seed in range(20, 28)])
    return found[:, np.argsort(classifier.classes_)]


# Making one


@pytest.mark.parametrize("name", ["predict", "predict_proba", "classify", "segments", "explain", "remove", "save"])
def test_nothing_is_said_before_classes_are_known(make: Make, name: str) -> None:
    with pytest.raises(NotFittedError, match="knows no classes yet: call fit with a few examples of each") as caught:
        getattr(make(), name)("never made")
    assert isinstance(caught.value, UserError)
    assert not any(
        hasattr(make(), known) for known in ("classes_", "threshold_")
    )  # as estimators are asked whether they are fitted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 0}, "frames is 0 and resize 40: set them to whole numbers, frames to 1 or more"),
        ({"frames": 8.0}, "frames is 8.0 .* set them to whole numbers"),
        ({"frames": 10**8}, "frames is 100000000 .* at most 1000"),
        ({"frames": "8"}, "frames is '8' .* set them to whole numbers"),
        ({"resize": 39}, "resize 39: .* resize to 40, the side that the tower takes, or more"),
        ({"resize": 10**5}, "resize 100000: .* at most 4096"),
        ({"workers": -1}, "workers is -1"),
        ({"workers": "2"}, "workers is '2'; it must be a number, at least 0"),
        ({"workers": 1.5}, "workers is 1.5: give a whole number"),
        ({"timeout": float("nan")}, "timeout is nan"),
        ({"timeout": "long"}, "timeout is 'long'; it must be a number, above 0"),
        ({"threshold": "3"}, "threshold is '3'; it must be a number"),
    ],
)
def test_options_out_of_range(make: Make, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make("otam", **options)


def test_numbers_of_numpy_are_numbers(make: Make, videos: Path, tmp_path: Path) -> None:
    classifier = make("otam", frames=np.int64(4), resize=np.int32(48), threshold=np.float32(0.5), workers=np.int8(0))
    classifier.fit({"a": videos / "eat" / "0.mp4"}).save(tmp_path / "saved")
    assert FewShotClassifier.load(tmp_path / "saved").threshold == 0.5


@pytest.mark.parametrize("change", [("threshold", "3"), ("threshold", float("nan"))])
def test_what_is_no_threshold_is_not_saved(make: Make, videos: Path, tmp_path: Path, change: tuple[str, Any]) -> None:
    classifier = make("otam").fit({"a": videos / "eat" / "0.mp4"})
    setattr(classifier, *change)
    with pytest.raises(UserError, match="threshold is"):
        classifier.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_what_is_computed_from_labels_is_plain(make: Make, videos: Path) -> None:
    found = make("otam").fit(videos).predict([videos / "eat" / "0.mp4"] * 2)
    label = found[0]
    right = found == [label, "no class"]
    assert type(right) is np.ndarray
    assert right.tolist() == [True, False]
    assert f"{right.mean():.1%}" == "50.0%"
    assert (found == label).all()
    assert type((found != label).sum()) is np.int64
    assert found.tolist() == [label, label]
    assert np.unique(found).tolist() == [label]
    found[1] = "corrected"
    assert "corrected" in repr(found)


def test_a_model_that_draws_is_refused() -> None:
    with pytest.raises(UserError, match=r"selection 'sample' draws prompts, .* take 'argmax'"):
        FewShotClassifier(make_model(selection="sample"))


def test_clips_are_read_as_in_the_models_training(videos: Path) -> None:
    model = make_model("otam").train()
    model.reading = {"frames": 3, "resize": 64}
    path = videos / "eat" / "0.mp4"
    cases: list[tuple[dict[str, Any], ClipReader]] = [
        ({}, ClipReader(frames=3, resize=64, size=40)),
        ({"frames": 5, "resize": 48}, ClipReader(frames=5, resize=48, size=40)),
    ]
    of_published: dict[str, Any] = {"resize_mode": "squash", "sampling": "linspace"}
    for options, reader in [*cases, ({}, ClipReader(frames=3, resize=64, size=40, **of_published))]:
        if reader.sampling == "linspace":
            model.reading |= of_published
        found = FewShotClassifier(model, **options).fit({"a": path}).explain(path).frames
        assert found is not None
        assert found.equal(reader.read(str(path))[0])
        array = read_frames(str(path), range)[0].permute(0, 2, 3, 1)
        again = FewShotClassifier(model, **options).fit({"a": array}).explain(array).frames
        assert again is not None
        assert found.equal(again)
    assert not model.training
    model.reading = None
    found = FewShotClassifier(model).fit({"a": path}).explain(path).frames
    assert found is not None
    assert found.shape == (8, 3, 40, 40)


def test_clips_are_resized_as_images_were_for_a_tower_whose_training_is_not_known(
    videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("otam")
    monkeypatch.setattr(model.model.backbone, "interpolation", "bicubic")
    path = videos / "eat" / "0.mp4"
    found = FewShotClassifier(model).fit({"a": path}).explain(path).frames
    assert found is not None
    expected = [ClipReader(8, 40, 40, resize_mode=mode).read(str(path))[0] for mode in get_args(ResizeMode)]
    assert [found.equal(frames) for frames in expected] == [False, True, False]


# Examples


def test_from_a_folder_as_from_what_is_in_it(make: Make, videos: Path, images: Path, tmp_path: Path) -> None:
    shutil.copytree(videos, tmp_path, dirs_exist_ok=True)
    shutil.copytree(images, tmp_path / "Dance")
    from_folder = make().fit(tmp_path)
    assert list(from_folder.classes_) == ["Dance", "eat", "jump_up", "walk"]
    of_eating = [tmp_path / "eat" / f"{v}.mp4" for v in range(3)]
    of_jumping = [ClipReader(8, 40, 40).read(str(path))[0] for path in sorted((videos / "jump_up").iterdir())]
    array = torch.stack(of_jumping).permute(0, 1, 3, 4, 2)  # of several clips
    support: dict[str, Any] = {"Dance": tmp_path / "Dance", "eat": of_eating, "jump_up": array}
    by_hand = make().fit(support | {"walk": tmp_path / "walk"})
    assert np.allclose(probabilities(from_folder), probabilities(by_hand), atol=1e-6)


def test_fit_returns_itself_and_forgets_earlier_classes(make: Make, classifier: FewShotClassifier) -> None:
    support: dict[str, Any] = {"swim": noise(2), "climb": noise(3)}
    assert classifier.fit(support) is classifier
    assert list(classifier.classes_) == ["swim", "climb"]
    assert np.array_equal(probabilities(classifier), probabilities(make("otam").fit(support)))


@pytest.mark.parametrize("head", ["zero_shot", "otam"])
def test_two_classes_with_one_text_are_refused_where_texts_count(head: str) -> None:
    classifier = FewShotClassifier(CLIPM2DF(backbone="tiny", head=head, freeze_backbone=True))
    support = {"open": noise(0), "close": noise(1)}
    texts = {"Open": "moving", "close": "moving"}  # the class is spelled "open"
    if head == "otam":
        assert classifier.fit(support, texts=texts).classes_.tolist() == ["open", "close"]
        return
    with pytest.raises(UserError, match="the classes 'open' and 'close' have one text, 'moving'"):
        classifier.fit(support, texts=texts)
    classifier.fit(support)
    with pytest.raises(UserError, match="the classes 'open' and 'shut' have one text, 'open'"):
        classifier.add("shut", noise(2), text="open")
    assert classifier.classes_.tolist() == ["open", "close"]


def test_texts_are_what_the_prompts_say() -> None:
    model = plain_model("zero_shot")  # looks at nothing but prompts
    support: dict[str, Any] = {"HandstandPushups": noise(0), "draw_sword": noise(1)}
    query = noise(2)

    def expected(*texts: str) -> np.ndarray[Any, Any]:
        with torch.no_grad():
            features = model.model.encode_frames(torch.from_numpy(query).permute(0, 3, 1, 2))[None]
            prompts = model.encode_prompts(texts)
            logits = model.model.head(torch.zeros(2, 1, 8, 64), features, prompts).logits
            return np.asarray(logits.softmax(-1))

    plain = FewShotClassifier(model).fit(support)
    assert plain.predict_proba(query) == pytest.approx(expected("handstand pushups", "draw sword"), abs=1e-5)
    told = FewShotClassifier(model).fit(support, texts={"draw_sword": "a Blade"})
    assert told.predict_proba(query) == pytest.approx(expected("handstand pushups", "a Blade"), abs=1e-5)
    told.add("HandstandPushups", noise(3), text="upside down")
    assert told.predict_proba(query) == pytest.approx(expected("upside down", "a Blade"), abs=1e-5)
    told.add("draw_sword", noise(4))  # what was said before stays
    assert told.predict_proba(query) == pytest.approx(expected("upside down", "a Blade"), abs=1e-5)


# Adding and removing


@pytest.mark.parametrize("head", ["m2df", "otam", "clip_fsar"])
def test_adding_and_removing_is_fitting_anew(make: Make, head: str) -> None:
    classifier = make(head)
    assert classifier.add("run", noise(0)).add("eat", [noise(1), noise(2)]) is classifier
    classifier.add("jump", noise(3)).add("run", [noise(4), noise(5)])
    assert classifier.remove("eat") is classifier
    classifier.add("eat", noise(6))
    assert list(classifier.classes_) == ["run", "jump", "eat"]
    anew = make(head).fit({"run": [noise(0), noise(4), noise(5)], "jump": noise(3), "eat": noise(6)})
    assert np.allclose(probabilities(classifier), probabilities(anew), atol=1e-6)
    before = classifier.threshold_
    assert before == pytest.approx(anew.threshold_, abs=1e-5)


SUPPORT_THAT_IS_NONE: list[tuple[tuple[Any, ...], str]] = [
    (({"a": []},), "the class 'a' has no examples: give one or more"),
    (({3: noise(0)},), "a class can't be called 3: give it a name"),
    (({"a": noise(0)}, {"b": "x", "c": "y"}), "texts names 'b', 'c', which is no class of the support"),
    (({"a": noise(0)[0]},), r"no example of the class 'a' can be read: array 0 \(an array of shape"),
    (({"a": ["no.mp4", "nor.mp4"]},), r"'a' can be read: no.mp4 \(there is no such file\), nor.mp4 .*; give one"),
]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *((lambda c, v, given=given: c.fit(*given), message) for given, message in SUPPORT_THAT_IS_NONE),
        (lambda c, v: c.fit({"a": v / "eat" / "0.mp4", "b": v / "walk" / ".." / "eat" / "0.mp4"}), "both 'a' and 'b'"),
        (lambda c, v: c.add("walk", "none.mp4"), "no example of the class 'walk' can be read"),
        (lambda c, v: c.add("walk", []), "has no examples"),
        (lambda c, v: c.add(" ", noise(0)), "can't be called ' '"),
        (lambda c, v: c.add("none of these", noise(0)), "can't be called 'none of these', .*: rename it"),
        (lambda c, v: c.add("walk", noise(0), text=3), "text"),
        (lambda c, v: c.add("walk", noise(0), text="\ud800"), "text"),
        (lambda c, v: c.add("walk", v / "eat" / "0.mp4"), "is an example of both 'eat' and 'walk': leave it to one"),
        (lambda c, v: c.add("run", v / "eat" / "0.mp4"), "is an example of both"),
        (lambda c, v: c.remove("walk"), "there is no class 'walk'; there are run, eat"),
    ],
)
def test_what_fails_changes_nothing(make: Make, videos: Path, change: Callable[..., object], message: str) -> None:
    classifier = make("otam").fit({"run": [noise(0), noise(1)], "eat": [videos / "eat" / "0.mp4", noise(2)]})
    before, threshold = probabilities(classifier), classifier.threshold_
    with pytest.raises(UserError, match=message):
        change(classifier, videos)
    assert list(classifier.classes_) == ["run", "eat"]
    assert np.array_equal(probabilities(classifier), before)
    assert classifier.threshold_ == threshold


def test_the_only_class_stays(make: Make) -> None:
    classifier = make("otam").fit({"run": noise(0)})
    with pytest.raises(UserError, match="'run' is the only class: add another before it is removed"):
        classifier.remove("run")
    assert classifier.predict(noise(1)) == "run"


# What it says


def test_one_clip_or_several_in_any_form(make: Make, videos: Path, images: Path) -> None:
    classifier = make().fit(videos)
    paths = [str(path) for path in sorted((videos / "jump_up").iterdir())]
    each = [classifier.predict(path) for path in paths]
    assert all(type(label) is str for label in each)
    rows = np.concatenate([classifier.predict_proba(path) for path in paths])
    assert rows.shape == (3, 3)
    assert rows.sum(1) == pytest.approx([1, 1, 1], abs=1e-6)
    assert each == [list(classifier.classes_)[place] for place in rows.argmax(1)]
    clips = torch.stack([ClipReader(8, 40, 40).read(path)[0] for path in paths]).permute(0, 1, 3, 4, 2)
    for several in (paths, [Path(path) for path in paths], videos / "jump_up", clips, clips.numpy(), list(clips)):
        found = classifier.predict(several)
        assert isinstance(found, np.ndarray)
        assert found.tolist() == each
        assert np.allclose(classifier.predict_proba(several), rows, atol=1e-5)
    assert classifier.predict(images) == classifier.predict([images])[0]
    assert classifier.predict([paths[0]]).shape == (1,)
    assert classifier.predict_proba([]).shape == (0, 3)
    assert classifier.predict([]).shape == (0,)


def test_the_order_of_many_clips_is_kept(classifier: FewShotClassifier) -> None:
    clips = [noise(seed) for seed in range(40)]  # more than are encoded together
    found = classifier.predict_proba(clips)
    for place in (0, 15, 16, 31, 32, 39):
        assert np.allclose(found[place], classifier.predict_proba(clips[place])[0], atol=1e-5)
    assert sorted(place for place, _ in classifier.classify(clips)) == list(range(40))


@pytest.mark.parametrize(("head", "share"), [("m2df", 0.0), ("m2df", 0.4), ("otam", 0.0), ("clip_fsar", 0.0)])
def test_it_says_what_an_episode_says(head: str, share: float, scenes: dict[str, list[str]]) -> None:
    model = make_model(head, text_fusion=share)
    labels = tuple(sorted(scenes))[:4]
    rows = tuple(tuple(Video(path, label, "test", label) for path in scenes[label]) for label in labels)
    split = Split("test", labels, labels, rows)
    order = (2, 0, 3)
    plan = EpisodePlan(order, tuple(rows[c][:2] for c in order), tuple(rows[c][2:4] for c in order))
    shape = EpisodeShape(n_way=3, n_shot=2, n_query=2)
    reader = ClipReader(frames=8, resize=40, size=40)
    episode: Episode = EpisodeDataset(split, shape, reader, seed=0, augment=False, plans=[plan])[0]
    with torch.no_grad():
        expected = played(model, episode)

    classifier = FewShotClassifier(model).fit(
        {labels[c]: scenes[labels[c]][:2] for c in order}, texts={labels[c]: labels[c] for c in order}
    )
    found = classifier.predict_proba([path for c in order for path in scenes[labels[c]][2:4]])
    assert found == pytest.approx(expected, abs=1e-5)


def played(model: CLIPM2DF, episode: Episode) -> np.ndarray[Any, Any]:
    """Probabilities ``(n_queries, n_way)`` of an episode as a test has it."""
    prompts = model.encode_prompts(episode["class_names"])[episode["class_indices"]]
    query = model.model.encode_frames(episode["query"])
    logits = fuse_text(model.model.head, model.text_fusion, model(episode).logits, query, prompts)
    scores: np.ndarray[Any, Any] = logits.softmax(-1)[0].numpy()
    return scores


def test_why_a_clip_is_taken_for_what_it_is(classifier: FewShotClassifier, videos: Path) -> None:
    path = videos / "eat" / "0.mp4"
    found = classifier.explain(path)
    (row,) = classifier.predict_proba(path)
    assert found.video == str(path)
    assert found.label == classifier.predict(path)
    assert list(found.probabilities.values()) == pytest.approx(row.tolist(), abs=1e-5)
    assert found.threshold is None
    assert not found.rejected
    assert found.compared[0] == found.label
    # The closest example of the closest class is shown beside it.
    for seed in (0, 1):
        shown = classifier.explain(noise(seed)).examples["run"]
        assert shown.equal(torch.from_numpy(noise(seed)).permute(0, 3, 1, 2))
    with pytest.raises(UserError, match=r"none.mp4 can't be read: there is no such file"):
        classifier.explain("none.mp4")


def test_labels_of_several_clips_are_shown_beside_their_names(make: Make, videos: Path) -> None:
    classifier = make("otam").fit(videos)
    found = classifier.predict(videos / "walk")
    lines = repr(found).splitlines()
    assert str(found) == repr(found)
    said = [p for _, p in sorted(classifier.classify(videos / "walk"), key=lambda pair: pair[0])]
    assert found.predictions == tuple(said)
    for line, label, prediction in zip(lines, found, said, strict=True):
        assert prediction.label == label
        assert line.split() == [prediction.video, label, f"{prediction.probability:.1%}"]
    # It is an array of labels all the same.
    assert (found == np.array(found.tolist())).all()
    assert np.asarray(found).tolist() == [p.label for p in said]
    assert repr(found[:2]) == repr(np.asarray(found)[:2])
    assert repr(found == "walk") == repr(np.asarray(found) == "walk")
    in_memory = classifier.predict([noise(0), noise(1)])
    assert repr(in_memory) == repr(np.asarray(in_memory))
    with pytest.warns(UserWarning, match="can't be read"):
        mixed = classifier.predict(["no\x1b[2J.mp4", noise(0)])
    first, second = repr(mixed).splitlines()
    assert first == "no\\x1b[2J.mp4  (can't be read: there is no such file)"
    assert second.startswith("array 1        ")


def test_a_classifier_is_shown_by_its_model_and_classes(make: Make) -> None:
    assert "model='tiny', head='otam', frames=8, resize=40, device='cpu', examples={}" in repr(make("otam"))
    fitted = make("otam", frames=4).fit({"run": [noise(0), noise(1)], "e\x1bt": noise(2)})
    assert repr(fitted).startswith("FewShotClassifier(model='tiny', head='otam', frames=4, ")
    assert repr(fitted).endswith("examples={'run': 2, 'e\\x1bt': 1})")
    many = make("otam").fit({f"class {k}": noise(k) for k in range(22)})
    assert "'class 19': 1 and 2 more" in repr(many)


# Models that have come to nothing

PARTS = {"all": "", "tower": "model.backbone.visual.", "text": "model.backbone.text.", "head": "model.head.views."}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e38, 0.0])
@pytest.mark.parametrize("part", PARTS)
def test_a_model_that_is_no_number_is_refused(part: str, value: float, videos: Path) -> None:
    """Spoilt before the examples are seen, and afterwards: no label comes without a probability."""
    fitted = FewShotClassifier(make_model()).fit({"run": [noise(0), noise(1)], "eat": [noise(2), noise(3)]})
    spoilt = FewShotClassifier(make_model())
    for classifier in (fitted, spoilt):
        with torch.no_grad():
            for name, parameter in classifier.model.named_parameters():
                if name.startswith(PARTS[part]):
                    parameter.fill_(value)
    path = videos / "eat" / "0.mp4"
    asked: list[Callable[[], Any]] = [
        lambda: fitted.predict(noise(0)),
        lambda: fitted.predict([path, noise(1)], reject=True),
        lambda: fitted.predict_proba(noise(0)),
        lambda: dict(fitted.classify([noise(0)])),
        lambda: fitted.explain(noise(0)),
        lambda: fitted.segments(path, window=0.5),
        lambda: spoilt.fit({"run": noise(0), "eat": noise(1)}).predict(noise(0)),
    ]
    refused = 0
    for ask in asked:
        try:
            said = repr(ask())
        except UserError as error:
            said = str(error)
            refused += bool(re.search("not finite|all features are zero", said))
        # Zeros in the head alone, and prompts that were made before, leave numbers.
        assert "nan" not in said.replace("NaN or", "")
    if part in ("all", "tower") or (value and part == "head"):
        assert refused == len(asked)
    elif value:
        assert refused


def test_scores_that_are_not_finite_are_refused_by_name(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = make("otam").fit({"run": noise(0), "eat": noise(1)})
    head = type(classifier.model.model.head)
    monkeypatch.setattr(head, "compare", lambda *_: torch.full((1, 2), float("nan")))
    with pytest.raises(UserError, match="the scores of tiny are not finite"):
        classifier.predict(noise(0))


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_half_precision_changes_the_last_digits(precision: str, make: Make) -> None:
    support = {"run": [noise(0), noise(1)], "eat": [noise(2), noise(3)]}
    half, full = make("otam", precision=precision).fit(support), make("otam").fit(support)
    clips = [noise(seed) for seed in range(4, 8)]
    found, expected = half.predict_proba(clips), full.predict_proba(clips)
    assert found == pytest.approx(expected, abs=0.1)
    assert not np.array_equal(found, expected)
    with pytest.raises(UserError, match="precision is '16': give one of 32-true, bf16-mixed, 16-mixed"):
        make("otam", precision="16")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("head", HEADS)
def test_half_precision_gives_the_labels_of_float32(
    head: str, precision: str, make: Make, scenes: dict[str, list[str]]
) -> None:
    support = {label: videos[:2] for label, videos in scenes.items()}
    clips = [video for videos in scenes.values() for video in videos[2:]]
    frames = 6 if head == "ts_fsar" else 8  # as many as the head was made for
    half, full = (make(head, precision=told, frames=frames).fit(support) for told in (precision, "32-true"))
    found, expected = half.predict_proba(clips), full.predict_proba(clips)
    assert not np.array_equal(found, expected)
    assert found.argmax(-1).tolist() == expected.argmax(-1).tolist()
    assert len(set(expected.argmax(-1))) > 2  # one label would show little


# Clips that can't be read


def warned(recorded: pytest.WarningsRecorder) -> str:
    (only,) = [w for w in recorded if w.category is UserWarning]
    return str(only.message)


def test_broken_examples_are_left_out(make: Make, videos: Path, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("404\n" * 50)
    good = [videos / "eat" / f"{v}.mp4" for v in range(3)]
    with pytest.warns(UserWarning, match="left out") as recorded:
        classifier = make().fit({"eat": [good[0], tmp_path / "text.mp4", good[1], "no.mp4", good[2]], "run": noise(0)})
    assert re.search(r"of the class 'eat' .*: .*text.mp4 \(.*\), no.mp4 \(there is no such", warned(recorded))
    anew = make().fit({"eat": good, "run": noise(0)})
    assert np.allclose(probabilities(classifier), probabilities(anew), atol=1e-6)


def test_the_warning_of_examples_points_to_the_call(make: Make) -> None:
    classifier = make("otam").fit({"eat": noise(0)})
    for change in (classifier.fit, lambda support: classifier.add("run", support["eat"])):
        with pytest.warns(UserWarning, match="left out") as recorded:
            change({"eat": [noise(0), "no.mp4"]})
        assert [w.filename for w in recorded] == [__file__]


def test_of_several_clips_a_broken_one_has_no_label(classifier: FewShotClassifier) -> None:
    clips: list[Any] = [noise(0), "no.mp4", noise(1), noise(2)[..., :2]]
    with pytest.warns(UserWarning, match="can't be read") as recorded:
        found = classifier.predict(clips)
    assert warned(recorded).startswith("2 of 4 clips can't be read: no.mp4 (there is no such file), array 3 (an array")
    assert recorded[0].filename == __file__
    assert found[1] is None
    assert found[3] is None
    assert found[[0, 2]].tolist() == [classifier.predict(noise(0)), classifier.predict(noise(1))]
    with pytest.warns(UserWarning, match="2 of 4"):
        rows = classifier.predict_proba(clips)
    assert np.isnan(rows[[1, 3]]).all()
    assert np.allclose(rows[[0, 2]], classifier.predict_proba([noise(0), noise(1)]), atol=1e-6)
    said = dict(classifier.classify(clips))
    broken = said[1]
    assert (broken.video, broken.label, broken.probabilities) == ("no.mp4", None, {})
    assert broken.error == "there is no such file"


def test_a_broken_clip_alone_is_an_error(classifier: FewShotClassifier) -> None:
    for clip, name in (("no.mp4", r"no.mp4 \(there is no such file\)"), (noise(0)[0], r"array 0 \(an array of shape")):
        for method in (classifier.predict, classifier.predict_proba):
            with pytest.raises(UserError, match=f"the clip can't be read: {name}"):
                method(clip)
