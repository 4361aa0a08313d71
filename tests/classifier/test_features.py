"""Clips that come as features, as arrays or as feature tables, in the place of videos."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from clip_m2df import CLIPM2DF, CLIPBackbone, FewShotClassifier, UserError
from clip_m2df.classifier.classifier import NotFittedError
from clip_m2df.classifier.clips import TOGETHER, list_clips, videos_in
from clip_m2df.classifier.segments import Segment
from clip_m2df.datasets.feature_tables import write_feature_table
from tests.classifier.conftest import SMALL, Make, as_features, make_model, noise, plain_model, write_table
from tests.conftest import save_checkpoint

FRAMES, DIM = 8, 64  # of the small tower, where nobody has said how many frames


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def examples(videos: Path) -> dict[str, list[str]]:
    """The paths of the examples of each class; as many in one as in another only by chance."""
    found = {label: videos_in(videos / label) for label in ("jump_up", "eat", "walk")}
    return found | {"eat": found["eat"][:2]}


@pytest.fixture(scope="module")
def queries(videos: Path) -> list[Any]:
    """More clips than are encoded together."""
    return [*(noise(seed, height=40 + seed) for seed in range(16)), *videos_in(videos)[::2]]


def as_table(classifier: FewShotClassifier, examples: Mapping[str, Sequence[Any]], path: Path, **options: Any) -> Path:
    """The table of some examples."""
    clips = [clip for own in examples.values() for clip in own]
    labels = [label for label, own in examples.items() for _ in own]
    return write_table(path, as_features(classifier, clips), labels, **options)


def says_the_same(one: FewShotClassifier, these: Any, other: FewShotClassifier, those: Any) -> None:
    """To the bit, but for names and pictures."""
    assert list(one.classes_) == list(other.classes_)
    assert np.array_equal(one.predict_proba(these), other.predict_proba(those))
    assert one.threshold_ == other.threshold_
    found, expected = one.predict(these, reject=True), other.predict(those, reject=True)
    assert list(found) == list(expected)
    assert [p.distance for p in found.predictions] == [p.distance for p in expected.predictions]


# To the bit what videos give


@pytest.mark.parametrize("suffix", ["safetensors", "parquet"])
@pytest.mark.parametrize("head", ["m2df", "otam"])
def test_features_give_what_their_videos_give(
    head: str, suffix: str, make: Make, examples: dict[str, list[str]], queries: list[Any], tmp_path: Path
) -> None:
    videos = make(head).fit(examples)
    features = as_features(videos, queries)
    support = as_table(videos, examples, tmp_path / f"support.{suffix}")
    clips = write_table(tmp_path / f"clips.{suffix}", features, ["?"] * len(queries))
    with_table = make(head).fit(support)
    says_the_same(with_table, clips, videos, queries)
    assert len(set(with_table.predict(clips))) > 1  # one label would show little
    # As arrays, one by one and together, of numpy and of torch; and beside videos.
    says_the_same(make(head).fit(support), features.numpy(), videos, queries)
    says_the_same(make(head).fit(examples), [clip.numpy() for clip in features], videos, queries)
    arrays = {label: as_features(videos, paths) for label, paths in examples.items()}
    if head == "otam":  # the sum of a batch's products may be taken in another order
        assert np.array_equal(make(head).fit(arrays).predict_proba(features), videos.predict_proba(queries))
    found = with_table.predict(clips).predictions
    assert [p.video for p in found] == [str(tmp_path / "?" / f"{n}.mp4") for n in range(len(queries))]
    assert len(queries) > TOGETHER
    assert with_table.predict(features[3]) == found[3].label


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_features_may_have_any_floating_type(kind: torch.dtype, make: Make) -> None:
    support = {label: random(3, FRAMES, DIM, seed=seed).to(kind) for seed, label in enumerate("ab")}
    clips = random(4, FRAMES, DIM, seed=5).to(kind)
    same = {label: features.float() for label, features in support.items()}
    found = make("otam").fit(support).predict_proba(clips)
    assert np.array_equal(found, make("otam").fit(same).predict_proba(clips.float()))
    as_learnt = clips.clone().requires_grad_()
    assert np.array_equal(found, make("otam").fit(same).predict_proba(as_learnt))


def test_why_is_told_without_pixels(make: Make, examples: dict[str, list[str]]) -> None:
    videos, clip = make().fit(examples), noise(3)
    features = {label: as_features(videos, paths) for label, paths in examples.items()}
    (query,) = as_features(videos, [clip])
    why = make().fit(examples).explain(clip)
    blind = make().fit(features).explain(query)
    assert blind.frames is None
    assert blind.examples == {}
    for name in ("label", "probabilities", "distance", "prompt", "prompt_probabilities", "compared", "teacher"):
        assert getattr(blind, name) == pytest.approx(getattr(why, name), abs=1e-6), name
    assert blind.frame_scores.equal(why.frame_scores)
    assert all(torch.allclose(blind.alignments[view], own, atol=1e-5) for view, own in why.alignments.items())
    assert blind.figure().width > 300
    # A class has the frames of those of its examples that have some.
    mixed = make().fit(features).add("eat", [clip])
    found = mixed.explain(clip)
    assert found.frames is not None
    assert list(found.examples) == ["eat"]
    assert torch.equal(found.examples["eat"], found.frames)


# What a table has of its classes


def test_a_tables_class_embeddings_stand_for_prompts(
    make: Make, examples: dict[str, list[str]], queries: list[Any], tmp_path: Path
) -> None:
    videos = make().fit(examples)
    own = {label: plain_model("m2df").encode_prompts([label.replace("_", " ")])[0] for label in examples}
    same = make().fit(as_table(videos, examples, tmp_path / "same.safetensors", classes=own))
    says_the_same(same, queries, videos, queries)
    strange = {label: random(DIM, seed=seed) for seed, label in enumerate(examples)}
    other = make().fit(as_table(videos, examples, tmp_path / "other.safetensors", classes=strange))
    model = plain_model("m2df")
    assert not np.allclose(other.predict_proba(queries), videos.predict_proba(queries), atol=1e-4)
    expected = model.model.head(
        torch.stack([as_features(videos, examples["jump_up"]), as_features(videos, examples["walk"])]),
        as_features(videos, queries),
        torch.stack([strange["jump_up"], strange["walk"]]),
    )
    two = other.remove("eat").predict_proba(queries)
    torch.testing.assert_close(torch.from_numpy(two).float(), expected.logits.softmax(-1), atol=1e-5, rtol=1e-4)
    # What a person says of a class goes before what the table has.
    texts = {label: label.replace("_", " ") for label in examples}
    told = make().fit(tmp_path / "other.safetensors", texts=texts)
    says_the_same(told, queries, videos, queries)


def test_classes_that_came_with_prompts_keep_them(
    make: Make, examples: dict[str, list[str]], queries: list[Any], tmp_path: Path
) -> None:
    videos = make()
    strange = {label: random(DIM, seed=seed) for seed, label in enumerate(examples)}
    table = as_table(videos, examples, tmp_path / "table.safetensors", classes=strange)
    grown = make().fit(table).add("eat", examples["eat"][0]).add("run", noise(1))
    grown.add("walk", as_table(videos, {"walk": [noise(5)]}, tmp_path / "more.parquet"), text="to stroll")
    assert [c.text for c in grown._classes.values()] == [None, None, "to stroll", "run"]
    grown.save(tmp_path / "saved")
    again = FewShotClassifier.load(tmp_path / "saved")
    says_the_same(again, queries, grown, queries)
    assert np.array_equal(
        grown.add("eat", noise(2)).predict_proba(queries), again.add("eat", noise(2)).predict_proba(queries)
    )


# Classes


def test_classes_of_a_table(make: Make, tmp_path: Path) -> None:
    labels = ["b", "a", "b", "c"]
    table = write_table(tmp_path / "t.safetensors", random(4, FRAMES, DIM), labels)
    classifier = make("otam").fit(table)
    assert list(classifier.classes_) == ["b", "a", "c"]
    assert [len(c.features) for c in classifier._classes.values()] == [2, 1, 1]
    # Rows that are there already don't count twice.
    one = write_table(tmp_path / "one.safetensors", random(2, FRAMES, DIM, seed=1), ["d", "d"])
    classifier.add("e", one).add("e", one).remove("a")
    assert list(classifier.classes_) == ["b", "c", "e"]
    assert len(classifier._classes["e"].features) == 2
    with pytest.raises(
        UserError, match=r"the examples of 'f' are of several classes in .*t\.safetensors, b, a, c: give"
    ):
        classifier.add("f", table)
    with pytest.raises(UserError, match=r"d/0\.mp4 is an example of both 'e' and 'd'"):
        classifier.add("d", one)
    assert list(classifier.classes_) == ["b", "c", "e"]


def test_a_video_counts_once_whatever_its_augmentations(make: Make, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"path": f"{label}.mp4", "label": label, "split": "train", "augmentation": number}
        for label in "ab"
        for number in (1, 0)
    ]
    features = random(4, FRAMES, DIM)
    write_feature_table(tmp_path / "t.safetensors", rows, features)
    listed, alone = list_clips(tmp_path / "t.safetensors")
    assert not alone
    classifier = make("otam").fit(tmp_path / "t.safetensors")
    first = make("otam").fit({"a": features[1], "b": features[3]})
    assert np.array_equal(classifier.predict_proba(listed), first.predict_proba(features[[1, 3]]))


# How many frames


def test_the_first_examples_tell_how_many_frames_there_are(make: Make) -> None:
    classifier = make("otam")
    with pytest.raises(UserError, match="no example of the class 'b' can be read: array 0 "):
        classifier.fit({"a": random(2, 5, DIM), "b": random(6, DIM)})
    with pytest.raises(NotFittedError):
        classifier.predict(random(5, DIM))
    classifier.fit({"a": random(2, 5, DIM), "b": random(5, DIM, seed=1)})
    assert classifier.encoder.reader.frames == 5
    assert classifier.predict(random(5, DIM)) in ("a", "b")
    assert classifier.predict(noise(0)) in ("a", "b")  # seen in as many frames
    with pytest.raises(UserError, match=r"its features are 8 frames of width 64, and tiny takes 5 of width 64"):
        classifier.predict(random(FRAMES, DIM))
    classifier.fit({"a": random(3, DIM), "b": noise(0)})
    assert classifier.encoder.reader.frames == 3
    assert make("otam").add("a", random(2, DIM)).encoder.reader.frames == 2
    with pytest.raises(UserError, match="its features are 3 frames of width 64, and tiny takes 8 of width 64"):
        make("otam", frames=8).fit({"a": random(3, DIM)})
    model = make_model("otam")
    model.reading = {"frames": 4, "resize": 40}
    with pytest.raises(UserError, match="its features are 3 frames of width 64, and tiny takes 4 of width 64"):
        FewShotClassifier(model).fit({"a": random(3, DIM)})
    with pytest.raises(UserError, match="frames of a clip's features is 2000; it must be at most 1000"):
        make("otam").fit({"a": random(2000, DIM)})


# What is of no use


def spoilt(value: float, *places: Any) -> Tensor:
    features = random(FRAMES, DIM)
    features[places] = value
    return features


BAD: dict[str, tuple[Any, str]] = {
    "NaN": (spoilt(torch.nan, 2, 5), r"its features of frame 3 are not finite \(NaN or infinite\): compute them anew"),
    "infinite": (spoilt(-torch.inf, 0, 0), "its features of frame 1 are not finite"),
    "too large": (spoilt(1.0, 0, 0).double() * 1e300, "its features of frame 1 are not finite"),
    "too large for numpy": (spoilt(1.0, 0, 0).double().numpy() * 1e300, "its features of frame 1 are not finite"),
    "zeros": (spoilt(0.0, 7), "its features of frame 8 are all zero"),
    "width": (random(FRAMES, 32), "its features are 8 frames of width 32, and tiny takes 8 of width 64: compute them"),
    "frames": (random(16, DIM), "its features are 16 frames of width 64, and tiny takes 8 of width 64"),
    "empty": (random(0, DIM), r"its features are empty, \(0, 64\): give \(frames, dim\)"),
    "whole numbers": (
        np.ones((FRAMES, DIM), np.int64),
        r"an array of shape \(8, 64\) is no clip: .* floating features",
    ),
    "truths": (torch.ones(FRAMES, DIM, dtype=torch.bool), r"an array of shape \(8, 64\) is no clip"),
    "complex": (np.ones((FRAMES, DIM), np.complex64), r"an array of shape \(8, 64\) is no clip"),
    "one axis": (random(DIM), r"an array of shape \(64,\) is no clip"),
}


@pytest.mark.parametrize("kind", BAD)
def test_features_of_no_use(kind: str, make: Make) -> None:
    bad, message = BAD[kind]
    good = random(FRAMES, DIM)
    classifier = make("otam", frames=FRAMES).fit({"a": good, "b": random(FRAMES, DIM, seed=1)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match=f"the clip can't be read: array 0 \\({message}"):
            classifier.predict(bad)
        with pytest.raises(UserError, match=f"no example of the class 'c' can be read: array 0 \\({message}"):
            classifier.add("c", [bad])
        with pytest.raises(UserError, match=message):
            classifier.explain(bad)
    with pytest.warns(UserWarning, match=f"1 of 3 clips can't be read: array 1 \\({message}"):
        assert list(classifier.predict([good, bad, good])) == ["a", None, "a"]
    with pytest.warns(UserWarning, match=f"that can't be read are left out: array 0 \\({message}"):
        classifier.add("c", [bad, random(FRAMES, DIM, seed=2)])


@pytest.mark.parametrize(("frames", "dim"), [(FRAMES, 32), (5, DIM)])
def test_a_table_of_other_features_is_named(frames: int, dim: int, make: Make, tmp_path: Path) -> None:
    table = write_table(tmp_path / "other.safetensors", random(3, frames, dim), ["a", "b", "b"])
    message = (
        rf"the features in .*other\.safetensors are {frames} frames of width {dim}, and tiny takes 8 of width 64:"
        " compute them"
    )
    classifier = make("otam", frames=FRAMES).fit({"a": random(FRAMES, DIM)})
    for use in (classifier.fit, classifier.predict, lambda t: classifier.add("c", [noise(0), list_clips(t)[0][0]])):
        with pytest.raises(UserError, match=message):
            use(table)
    (tmp_path / "no.safetensors").touch()
    for name in ("no.safetensors", "none.safetensors", "none.parquet"):
        with pytest.raises(UserError, match=f"{name}"):
            classifier.predict(str(tmp_path / name))


# Segments


def test_segments_of_features(make: Make) -> None:
    """A long video by the features of its frames, shown as fast as windows show them."""
    classifier = make("otam").fit({"a": noise(1), "b": noise(2)})
    video = np.concatenate([noise(seed, frames=8) for seed in (1, 2, 1, 3)])
    frames = torch.from_numpy(video).permute(0, 3, 1, 2)
    features = torch.cat([classifier.encoder.frames(classifier.encoder.reader.crop(part)) for part in frames.split(16)])
    for reject in (False, True):
        options: dict[str, Any] = {"window": 2.0, "fps": 4.0, "reject": reject}
        found = classifier.segments(features, **options)
        assert found == classifier.segments(video, **options)
        assert len(found) > 1
    for fps in (2.0, 7.0):  # shown more slowly, and too fast for all of them
        same_times([*classifier.segments(features.numpy(), fps=fps)], classifier.segments(video, fps=fps))
    short = classifier.segments(features[:3], fps=4.0)
    same_times(short, classifier.segments(video[:3], fps=4.0))
    with pytest.raises(UserError, match="features have no times: give fps"):
        classifier.segments(features)
    with pytest.raises(UserError, match="its features are 30 frames of width 32, and tiny takes"):
        classifier.segments(random(30, 32), fps=4.0)
    with pytest.raises(UserError, match="its features of frame 1 are not finite"):
        classifier.segments(torch.full((30, DIM), torch.nan), fps=4.0)


def same_times(found: Sequence[Segment], expected: Sequence[Segment]) -> None:
    assert [s[:3] for s in found] == [s[:3] for s in expected]
    assert [s.probability for s in found] == pytest.approx([s.probability for s in expected], abs=1e-5)


def test_a_table_where_one_clip_is_taken(make: Make, tmp_path: Path) -> None:
    classifier = make("otam").fit({"a": random(FRAMES, DIM), "b": random(FRAMES, DIM, seed=1)})
    one = write_table(tmp_path / "one.safetensors", random(1, FRAMES, DIM, seed=1), ["?"])
    two = write_table(tmp_path / "two.safetensors", random(2, FRAMES, DIM), ["?", "?"])
    assert classifier.explain(one).label == "b"
    assert classifier.explain(one).video == str(tmp_path / "?" / "0.mp4")
    assert [s.label for s in classifier.segments(one, fps=8.0)] == ["b"]
    for use in (classifier.explain, lambda clip: classifier.segments(clip, fps=8.0)):
        with pytest.raises(UserError, match=r"two\.safetensors has 2 clips: give the features \(frames, dim\) of one"):
            use(two)


# Kept


@pytest.mark.parametrize("mixed", [False, True])
def test_a_saved_classifier_needs_no_table(
    mixed: bool, make: Make, examples: dict[str, list[str]], queries: list[Any], tmp_path: Path
) -> None:
    classifier = make()
    table = as_table(classifier, examples, tmp_path / "tables" / "t.safetensors")
    classifier.fit(table)
    if mixed:
        classifier.add("walk", noise(0)).add("run", [random(FRAMES, DIM), noise(1)])
    classifier.save(tmp_path / "saved")
    shutil.rmtree(tmp_path / "tables")
    again = FewShotClassifier.load(tmp_path / "saved")
    says_the_same(again, queries, classifier, queries)
    for clip in queries[:4]:
        why, other = classifier.explain(clip), again.explain(clip)
        assert list(why.examples) == list(other.examples)
        assert all(other.examples[name].equal(frames) for name, frames in why.examples.items())
    again.save(tmp_path / "saved")
    says_the_same(FewShotClassifier.load(tmp_path / "saved"), queries, classifier, queries)


# A model without a tower


def blind(head: str = "m2df", classes: Mapping[str, Tensor] | None = None) -> CLIPM2DF:
    """The head of the small model, on features alone, and what its training knew of classes."""
    options = SMALL if head == "m2df" else {}
    model = CLIPM2DF("features", {"dim": DIM}, head=head, head_options=options).eval()
    model.model.head.load_state_dict(plain_model(head).model.head.state_dict())
    if classes:
        cast(CLIPBackbone, model.model.backbone).keep_classes(classes)
    return model


@pytest.mark.parametrize("head", ["m2df", "otam"])
def test_a_head_alone_says_what_it_says_behind_its_tower(
    head: str, make: Make, examples: dict[str, list[str]], queries: list[Any], tmp_path: Path
) -> None:
    videos = make(head).fit(examples)
    clips = as_features(videos, queries)
    prompts = {label: plain_model(head).encode_prompts([label.replace("_", " ")])[0] for label in examples}
    support = as_table(videos, examples, tmp_path / "support.safetensors")
    known = FewShotClassifier(blind(head, prompts)).fit(support)  # whose classes are those of the training
    says_the_same(known, clips, videos, queries)
    beside = as_table(videos, examples, tmp_path / "beside.parquet", classes=prompts)
    strange = {label: random(DIM) for label in ("jump_up", "else")}
    told = FewShotClassifier(blind(head, strange)).fit(beside)  # the table goes before the training
    says_the_same(told, clips, videos, queries)
    for classifier in (known, told):
        classifier.save(tmp_path / "saved")
        says_the_same(FewShotClassifier.load(tmp_path / "saved"), clips, videos, queries)
    # As a checkpoint and as a folder, the classes of the training included.
    model = blind(head, prompts)
    model.save_pretrained(tmp_path / "model")
    for name in (tmp_path / "model", save_checkpoint(model, tmp_path / "model.ckpt")):
        says_the_same(FewShotClassifier.from_checkpoint(name).fit(support), clips, videos, queries)
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "| tower | none: it takes features of width 64, computed elsewhere |" in card
    assert "| prompt | embeddings of 3 classes |" in card


def test_classes_that_a_head_alone_does_not_know(make: Make, queries: list[Any], tmp_path: Path) -> None:
    features = {label: random(2, FRAMES, DIM, seed=seed) for seed, label in enumerate(["a", "b"])}
    needs_none = FewShotClassifier(blind("otam", {"a": random(DIM), "c": random(DIM)})).fit(features)
    says_the_same(needs_none, as_features(make("otam"), queries), make("otam").fit(features), queries)
    needs_none.save(tmp_path / "saved")
    again = FewShotClassifier.load(tmp_path / "saved")
    says_the_same(again, as_features(make("otam"), queries), make("otam").fit(features), queries)
    assert again.explain(random(FRAMES, DIM)).figure().width > 300
    embedded = write_table(tmp_path / "x.safetensors", random(1, FRAMES, DIM), ["x"], classes={"x": random(DIM)})
    grown = FewShotClassifier(blind("m2df", {"a": random(DIM), "c": random(DIM)})).fit(embedded)
    grown.add("x", random(FRAMES, DIM, seed=1)).add("a", random(2, FRAMES, DIM)).add("a", random(FRAMES, DIM, seed=2))
    assert [(c.text, len(c.features)) for c in grown._classes.values()] == [(None, 2), ("a", 3)]
    with pytest.raises(UserError, match="no embedding of the class 'b', but of a, c: give a feature table with"):
        FewShotClassifier(blind("m2df", {"a": random(DIM), "c": random(DIM)})).fit(features)
    with pytest.raises(UserError, match=r"there are no prompts, by which the model would score: .* a feature table"):
        FewShotClassifier(blind("m2df")).fit(features)


def test_what_needs_pixels_is_refused_where_there_is_no_tower(videos: Path, images: Path) -> None:
    classifier = FewShotClassifier(blind("otam")).fit({"a": random(FRAMES, DIM), "b": random(FRAMES, DIM, seed=1)})
    video = videos / "eat" / "0.mp4"
    uses: list[Callable[[Any], object]] = [
        classifier.predict,
        classifier.explain,
        lambda clip: classifier.fit({"a": clip}),
        lambda clip: classifier.add("a", clip),
        lambda clip: classifier.segments(clip, fps=4.0),
        lambda clip: classifier.predict([random(FRAMES, DIM), clip]),
    ]
    for use in uses:
        for clip, name in (
            (video, "0.mp4"),
            (images, "clip"),
            (noise(0), "frames in memory"),
            ("none.mp4", "none.mp4"),
        ):
            with pytest.raises(UserError, match=rf"features has no tower, and can't see .*{name}: give features, as a"):
                use(clip)
    assert list(classifier.classes_) == ["a", "b"]
    with pytest.raises(UserError, match="resize is 40, but features has no tower, and sees no frames: leave it out"):
        FewShotClassifier(blind("otam"), resize=40)
