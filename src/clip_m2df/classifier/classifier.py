"""FewShotClassifier: name the action in a clip from a handful of examples of each."""

from __future__ import annotations

import itertools
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clip_m2df.classifier import saving
from clip_m2df.classifier.clips import (
    Clip,
    ClipEncoder,
    Clips,
    Encoded,
    list_clips,
    list_examples,
    name_of,
    placed,
    the_clip,
    unique,
)
from clip_m2df.classifier.rejection import calibrate, near_identical
from clip_m2df.classifier.segments import Segment, Windows, find_segments
from clip_m2df.classifier.support import (
    NONE_OF_THESE,
    ClassScorer,
    SupportClass,
    check_disjoint,
    check_names,
    make_classes,
)
from clip_m2df.datasets.manifest import class_key
from clip_m2df.errors import UserError, printable, require, some
from clip_m2df.evaluation.conformal import Thresholds, nonconformity
from clip_m2df.evaluation.explanation import Explanation, compared_classes, explain
from clip_m2df.evaluation.open_set import SCORES
from clip_m2df.hub import has_adapters_apart, other_model
from clip_m2df.training.module import CLIPM2DF
from clip_m2df.video.isolation import Unreadable


class NotFittedError(UserError, AttributeError):
    """A classifier that knows no classes yet."""


class Prediction(NamedTuple):
    """The prediction for a clip.

    Attributes:
        video: its path, or "" for what was in memory.
        label: its class, ``none of these``, or None where it can't be read.
        probability: of that class, among the classes; NaN where there is none, ``none of these`` among it, which the
            distance tells.
        probabilities: of every class; empty where the clip can't be read.
        distance: to the closest class, 0 where all frames of both are the same picture; NaN where the clip can't be
            read.
        error: why it can't be read, or "".
        labels: the set of :meth:`FewShotClassifier.predict_sets`; None where none was asked for.
    """

    video: str
    label: str | None
    probability: float
    probabilities: dict[str, float]
    distance: float
    error: str = ""
    labels: tuple[str, ...] | None = None


class _Sets(NamedTuple):
    """By what clips get their sets of labels.

    Attributes:
        scorer: of as many examples of each class as the calibration was with.
        score: by which clips of known classes are told.
        thresholds: of the error rate.
    """

    scorer: ClassScorer
    score: str
    thresholds: Thresholds


class Labels(np.ndarray[Any, np.dtype[np.object_]]):
    """The labels of several clips, an array of names ``(n)`` that shows each beside its clip when it is printed.

    Attributes:
        predictions: of the clips, with their paths, probabilities and distances; empty for what numpy makes of the
            array, such as a part of it.
    """

    predictions: tuple[Prediction, ...]

    def __new__(cls, predictions: Sequence[Prediction]) -> Self:  # noqa: D102
        found = np.array([p.label for p in predictions], dtype=object).view(cls)
        found.predictions = tuple(predictions)
        return found

    def __array_finalize__(self, other: object) -> None:
        self.predictions = ()

    def __array_wrap__(self, array: Any, context: Any = None, return_scalar: bool = False) -> Any:
        return np.asarray(array)[()]  # what numpy computes from labels are no labels

    def __repr__(self) -> str:
        if not any(p.video for p in self.predictions) or self.tolist() != [p.label for p in self.predictions]:
            return repr(np.asarray(self))
        rows = [(printable(p.video) or f"array {index}", p) for index, p in enumerate(self.predictions)]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:{width}}  {_said(p)}" for name, p in rows)

    __str__ = __repr__


def _said(found: Prediction) -> str:
    """A label as people read it, with its probability or with why there is none."""
    if found.label is None:
        return f"(can't be read: {printable(found.error)})"
    share = "" if math.isnan(found.probability) else f" {found.probability:.1%}"
    return f"{printable(found.label)}{share}"


class FewShotClassifier:
    """Names the action in a clip from a handful of examples of each; nothing is trained.

    Clips may come as features of the model's tower, or of whatever the model was trained with, in the place of videos.
    A clip's features, and those of the examples, go through the model's head as in an episode of all classes at once.
    The classes may have any number of examples each. Which frames are seen, and how they are resized, is as in the
    model's training; where that is not known, the middles of segments, resized as images were for its tower.

    Args:
        model: a trained one, or one with a head that has nothing to train; it is put in eval mode.
        frames: frames of a clip; by default as many as in the model's training; where that is not known, as many as the
            first examples have that come as features, or 8.
        resize: short side of the frames in pixels before the crop; by default as in the model's training, or the crop's
            own size where that is not known.
        threshold: the distance beyond which a clip is none of the classes, in the place of what the examples tell.
        precision: what the visual tower computes in, ``32-true``, ``bf16-mixed`` or ``16-mixed``; by default
            ``32-true``, and on CUDA ``bf16-mixed``, or ``16-mixed`` where the device has no bf16. All else is in
            float32.
        workers: processes that read files; 0 reads in a thread of this one. With workers a script needs its code under
            ``if __name__ == "__main__":``, and a file on which a decoder crashes or hangs costs that file only.
        timeout: seconds after which a file is given up, with workers.

    Attributes:
        classes_: names of the classes, in the order in which they came.
        threshold: see above; it may be set at any time.
        calibration: what :meth:`predict_sets` goes by: the model's, until :meth:`calibrate` makes another.

    Raises:
        UserError: an option out of its range, or a model whose predictions would not repeat.
    """

    def __init__(
        self,
        model: CLIPM2DF,
        *,
        frames: int | None = None,
        resize: int | None = None,
        threshold: float | None = None,
        precision: str | None = None,
        workers: int = 0,
        timeout: float = 60.0,
    ) -> None:
        if not isinstance(model, CLIPM2DF):
            raise UserError(
                f"{model!r:.80} is no CLIPM2DF: FewShotClassifier.from_checkpoint takes a checkpoint's name"
            )
        if model.model.head.selection == "sample":
            raise UserError("selection 'sample' draws prompts, so that predictions would not repeat; take 'argmax'")
        self.model = model.eval()
        require(above=-math.inf, below=math.inf, threshold=threshold)
        self.encoder = ClipEncoder(
            model, frames=frames, resize=resize, precision=precision, workers=workers, timeout=timeout
        )
        self.threshold = threshold
        self.calibration = model.calibration
        self._classes: dict[str, SupportClass] = {}
        self._scorer: ClassScorer | None = None
        self._told: tuple[float | None] | None = None  # what the examples tell, once it has been asked for

    def __repr__(self) -> str:
        reader, classes = self.encoder.reader, {name: len(c.features) for name, c in self._classes.items()}
        counts = some([f"{name!r}: {count}" for name, count in classes.items()], most=20)
        return printable(
            f"{type(self).__name__}(model={self.model.source!r}, head={self.model.hparams['head']!r},"
            f" frames={reader.frames}{f', resize={reader.resize}' if self.model.image_size else ''},"
            f" device={str(self.model.device)!r},"
            f" examples={{{counts}}})"
        )

    @classmethod
    def from_checkpoint(
        cls,
        path_or_hub_name: str | os.PathLike[str],
        *,
        device: str | None = None,
        frames: int | None = None,
        resize: int | None = None,
        threshold: float | None = None,
        precision: str | None = None,
        workers: int = 0,
        timeout: float = 60.0,
        clip: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> Self:
        """A classifier with a trained model.

        Args:
            path_or_hub_name: a ``.ckpt`` file, a published checkpoint, a folder that ``save_pretrained`` wrote, or the
                hub's name of a model.
            device: where it runs; by default on CUDA where there is any.
            frames: see :class:`FewShotClassifier`.
            resize: the same.
            threshold: the same.
            precision: the same.
            workers: the same.
            timeout: the same.
            clip: with a published checkpoint, see :meth:`clip_m2df.CLIPM2DF.from_published`, or a folder whose
                adapters are apart, see :meth:`clip_m2df.CLIPM2DF.from_pretrained`.
            **options: of :class:`clip_m2df.CLIPM2DF`, such as ``selection`` and ``text_fusion``. Here ``selection`` is
                ``argmax`` by default for every model, so that predictions repeat.

        Raises:
            UserError: there is no such model, or it can't be read.
        """
        path = os.path.expanduser(path_or_hub_name)
        options = {"selection": "argmax"} | options
        if os.path.isfile(path):
            model = CLIPM2DF.load_from_checkpoint(path, map_location="cpu", clip=clip, **options)
        elif clip is not None and not has_adapters_apart(path):
            raise UserError(
                f"{path_or_hub_name} is neither the file of a published checkpoint nor a folder whose adapters are"
                f" apart, which alone take CLIP's weights beside them: check the name, or leave out {clip}"
            )
        elif os.path.isfile(os.path.join(path, saving.TABLE)):
            raise UserError(f"{path_or_hub_name} is a classifier with its classes: FewShotClassifier.load takes it")
        elif path.endswith(".ckpt"):
            missing = f"there is no checkpoint {path_or_hub_name}: check the name, or train one by clip-m2df fit"
            raise UserError(other_model(Path(path)) or missing)
        else:
            model = CLIPM2DF.from_pretrained(path_or_hub_name, clip=clip, **options)
        reading: dict[str, Any] = {
            "frames": frames,
            "resize": resize,
            "precision": precision,
            "workers": workers,
            "timeout": timeout,
        }
        return cls(placed(model, device), threshold=threshold, **reading)

    @property
    def classes_(self) -> NDArray[np.str_]:
        """Names of the classes, in the order of the columns of :meth:`predict_proba`."""
        self._check_fitted()
        return np.array(list(self._classes))

    @property
    def threshold_(self) -> float | None:
        """The distance beyond which a clip is none of the classes: ``threshold``, or what the examples tell.

        None with one class of one example, from which nothing can be told. Examples that are nearly the same make it
        too small; their class is named in a warning.
        """
        self._check_fitted()
        if self.threshold is not None:
            require(above=-math.inf, below=math.inf, threshold=self.threshold)
            return self.threshold
        if self._told is None:
            classes = list(self._classes.values())
            self._told = (calibrate(self.model, classes),)
            if alike := near_identical(classes):
                warnings.warn(
                    f"the examples of {some(map(repr, alike))} are nearly the same, as if cut from one video, so that"
                    " the threshold is too small: give examples of different videos, or set the threshold",
                    stacklevel=2,
                )
        return self._told[0]

    def fit(
        self, support: Mapping[str, Clips] | str | os.PathLike[str], texts: Mapping[str, str] | None = None
    ) -> Self:
        """Take these classes, in the place of all that were there.

        Args:
            support: the examples of each class, by its name; or a folder with a folder of examples for each class; or a
                feature table, each of whose rows is an example of its label, whatever its split.
            texts: what the prompt says of a class, where that is neither what a feature table has of it, nor its name
                in plain words.

        Raises:
            UserError: a class without an example that can be read, an example of two classes, two classes with one
                prompt where prompts count, or no class at all. Other examples that can't be read are named in a
                warning, and left out.
        """
        examples = list_examples(support)
        if texts is not None and not isinstance(texts, Mapping):
            raise UserError(f"texts is of type {type(texts).__name__}: give what prompts say by the class's name")
        spelled = {class_key(str(label)): label for label in examples}
        by_key = {class_key(str(label)): text for label, text in (texts or {}).items()}
        if unknown := [label for label in texts or () if class_key(str(label)) not in spelled]:
            raise UserError(f"texts names {some(map(repr, unknown))}, which is no class of the support")
        if len(by_key) < len(texts or ()):
            raise UserError("texts names a class twice, in two spellings: keep one")
        encoder = self.encoder.settled(clip for clips in examples.values() for clip in clips)
        classes = make_classes(encoder, examples, {spelled[key]: text for key, text in by_key.items()})
        self._check(classes)
        self._take(classes, encoder)
        return self

    def add(self, label: str, clips: Clips, text: str | None = None) -> Self:
        """Add a class, or examples to one that is there; files that it has already don't count twice.

        Args:
            label: the class.
            clips: its examples, or more of them.
            text: what the prompt says, where that is not its name in plain words.

        Raises:
            UserError: as :meth:`fit`; nothing has changed then.
        """
        listed, old = list_clips(clips)[0], self._classes.get(label)
        more = unique(listed, old.examples if old else ())
        texts = {} if text is None else {label: text}
        prompts: dict[str, Tensor] = {}
        if old is not None and text is None:  # what the class has of a prompt stays
            texts, prompts = ({}, {label: old.prompt}) if old.text is None else ({label: old.text}, {})
        encoder = self.encoder if self._classes else self.encoder.settled(more)
        if old is not None and listed and not more:
            check_names(label, label if text is None else text)
            new = old.changed(self.model, text)
        else:
            new = make_classes(encoder, {label: more}, texts, prompts)[label]
            new = new if old is None else old.changed(self.model, text, new)
        classes = self._classes | {label: new}
        self._check(classes)
        self._take(classes, encoder)
        return self

    def remove(self, label: str) -> Self:
        """Forget a class.

        Raises:
            UserError: there is none of that name, or it is the only one.
        """
        self._check_fitted()
        if label not in self._classes:
            raise UserError(f"there is no class {label!r}; there are {some(self._classes)}")
        if len(self._classes) == 1:
            raise UserError(f"{label!r} is the only class: add another before it is removed")
        self._take({name: c for name, c in self._classes.items() if name != label}, self.encoder)
        return self

    def _check(self, classes: Mapping[str, SupportClass]) -> None:
        check_disjoint(classes.values())
        texts = {label: c.text for label, c in classes.items() if c.text is not None}
        if self.model.image_size:  # without one, labels stand for prompts
            self.model.model.check_prompts(list(texts.values()), list(texts))

    def _take(self, classes: dict[str, SupportClass], encoder: ClipEncoder) -> None:
        scorer = ClassScorer(self.model, list(classes.values()))
        scorer.score(next(iter(classes.values())).features[:1])  # refused at once where no number comes of it
        self._scorer, self.encoder = scorer, encoder
        self._classes = classes
        self._told = None

    def _check_fitted(self) -> ClassScorer:
        if self._scorer is None:
            raise NotFittedError("this classifier knows no classes yet: call fit with a few examples of each")
        self.model.eval()  # whoever has it may have trained it on
        return self._scorer

    def predict(self, clips: Clips, *, reject: bool = False) -> Any:
        """The class of each clip.

        Args:
            clips: a clip, that is the path of a video or of a folder of numbered images, uint8 frames
                ``(frames, height, width, 3)``, or floating features ``(frames, dim)``; or several, as a list, as an
                array, as a folder or as a feature table.
            reject: say ``none of these`` of clips that are farther from every class than :attr:`threshold_`.

        Returns:
            A name for one clip; for several :class:`Labels`, an array of names ``(n)`` that shows each beside its
            clip, those of a folder in the order of their paths. Of several, one that can't be read is None and named in
            a warning.

        Raises:
            UserError: the only clip can't be read, or there is no threshold.
        """
        predictions, alone = self._predict(clips, reject)
        return predictions[0].label if alone else Labels(predictions)

    def predict_sets(self, clips: Clips, error: float = 0.1) -> Any:
        """Sets of labels that hold the truth, but for a share of ``error``.

        The truth of a clip is its class, or "none of these" if it shows none of the classes. The promise is one over
        classes: it holds on average where the classes of this classifier, and those of other clips, could as well have
        been among the classes of the calibration, drawn from the same source; see docs/guarantees.md.

        An empty set says that nothing fits, neither a class nor that it is none of them. "none of these" alone
        rejects the clip, which a clip of a class suffers at most at the rate of ``error``.

        The sets go by as many examples of each class as the class with the fewest has, or by as many as there is a
        calibration for below that; the first ones of each.

        Args:
            clips: see :meth:`predict`.
            error: the rate at which a set may miss the truth.

        Returns:
            For one clip a tuple of labels, the likeliest first and "none of these" last; for several a list of such.
            Of several, one that can't be read has None and is named in a warning.

        Raises:
            UserError: there is no calibration, or none for so many classes and examples; or the only clip can't be
                read.
        """
        predictions, alone = self._predict(clips, reject=False, sets=self._sets(error))
        return predictions[0].labels if alone else [p.labels for p in predictions]

    def calibrate(
        self, further: Mapping[str, Clips] | str | os.PathLike[str], texts: Mapping[str, str] | None = None
    ) -> Self:
        """Calibrate :meth:`predict_sets` on further classes of one's own, for as many classes as there are here.

        With k further classes there can be a promise for error rates from 1/(k + 1) on. It is saved with the
        classifier, and for another number of classes or examples it has to be made anew.

        Args:
            further: clips of classes that the classifier does not have, as the support of :meth:`fit`; at least as many
                classes as it has, with a clip more each than it has examples of the class with the fewest. One class
                more yet is needed to tell what is none of these.
            texts: see :meth:`fit`.

        Raises:
            UserError: there are too few classes or clips, or one is the classifier's own; nothing has changed then.
        """
        self._check_fitted()
        n_way, n_shot = len(self._classes), min(len(c.features) for c in self._classes.values())
        if n_way == 1:
            raise UserError("a single class makes no sets: give the classifier two or more")
        examples = list_examples(further)
        own = {class_key(label): label for label in self._classes}
        if shared := [own[class_key(str(label))] for label in examples if class_key(str(label)) in own]:
            raise UserError(f"{some(map(repr, shared))} is a class of the classifier: calibrate on others")
        classes = list(make_classes(self.encoder, examples, texts or {}).values())
        check_disjoint([*self._classes.values(), *classes])
        enough = [c for c in classes if len(c.features) > n_shot]
        if len(enough) < n_way:
            raise UserError(
                f"of the {len(classes)} further classes {len(enough)} have {n_shot + 1} clips or more, too few for"
                f" {n_way} classes with {n_shot} example{'s' if n_shot > 1 else ''}: give {n_way} such classes or more"
            )
        ends = [0, *itertools.accumulate(len(c.features) for c in enough)]
        self.calibration = self.model.calibrate(
            torch.cat([c.features for c in enough]),
            torch.stack([c.prompt for c in enough]),
            [range(*pair) for pair in itertools.pairwise(ends)],
            [n_shot],
            [n_way],
        )
        return self

    def check_sets(self, error: float) -> None:
        """Refuse an error rate, or a calibration, with which there are no sets; warn of what makes them large.

        Raises:
            UserError: there is no calibration, or none for so many classes and examples, or for other options.
        """
        self._sets(error)

    def _sets(self, error: float) -> _Sets:
        """What clips get their sets by, see :meth:`check_sets`."""
        self._check_fitted()
        require(above=0, below=1, error=error)
        remedy = (
            "give clips of further classes to calibrate, or calibrate the checkpoint by clip-m2df validate --calibrate"
        )
        known = self.calibration
        if known is None:
            raise UserError(f"{self.model.source} has no calibration, by which sets of labels are made: {remedy}")
        own = self.model.goes_by(self.encoder.reader.frames)
        for name, value in known.goes_by.items():
            if own.get(name) != value:
                raise UserError(
                    f"the calibration is for {name} {value}, not for {own.get(name)}: give {value}, or {remedy}"
                )
        counts = [len(c.features) for c in self._classes.values()]
        usable = [n for n in known.n_shots if n <= min(counts) and known.n_classes(len(counts), n)]
        if not usable:
            shots = f"{min(counts)} example{'s' if min(counts) > 1 else ''} of each"
            raise UserError(f"the calibration is for {known}, and not for {len(counts)} classes with {shots}: {remedy}")
        n_shot = max(usable)
        if max(counts) > n_shot:
            warnings.warn(
                f"sets of labels go by the first {n_shot} of the examples of each class, for which there is a"
                " calibration",
                stacklevel=3,
            )
        thresholds, n_classes = known.at(len(counts), n_shot, error), known.n_classes(len(counts), n_shot)
        if math.isinf(thresholds.known):
            warnings.warn(
                f"the {n_classes} classes of the calibration are too few for an error rate of {error:g}, and every set"
                f" has all labels: {n_classes} classes allow {1 / (n_classes + 1):.3f} or more",
                stacklevel=3,
            )
        elif math.isinf(thresholds.unknown):
            warnings.warn(
                f"the calibration has no clips of classes beside those of an episode of {len(counts)}, so that"
                f" {NONE_OF_THESE!r} is in every set",
                stacklevel=3,
            )
        classes = [
            c if len(c.features) == n_shot else c.only(self.model, range(n_shot)) for c in self._classes.values()
        ]
        return _Sets(ClassScorer(self.model, classes), known.score, thresholds)

    def predict_proba(self, clips: Clips) -> NDArray[np.float64]:
        """Probabilities of the classes ``(n, n_way)``, also of one clip; not a number where one can't be read.

        They say how the classes compare, and sum to 1 also for a clip of none of them.

        Args:
            clips: see :meth:`predict`.

        Raises:
            UserError: see :meth:`predict`.
        """
        nothing = [float("nan")] * len(self.classes_)
        rows = [list(p.probabilities.values()) or nothing for p in self._predict(clips, reject=False)[0]]
        return np.array(rows, dtype=np.float64).reshape(len(rows), len(nothing))

    def _predict(self, clips: Clips, reject: bool, sets: _Sets | None = None) -> tuple[list[Prediction], bool]:
        listed, alone = list_clips(clips)
        found = dict(self._classify(listed, self._check_fitted(), self._rejecting(reject), sets))
        predictions = [found[index] for index in range(len(listed))]
        broken = [f"{p.video or f'array {index}'} ({p.error})" for index, p in enumerate(predictions) if p.error]
        if broken and alone:
            raise UserError(f"the clip can't be read: {broken[0]}")
        if broken:
            warnings.warn(f"{len(broken)} of {len(listed)} clips can't be read: {some(broken)}", stacklevel=3)
        return predictions, alone

    def classify(
        self, clips: Clips, *, reject: bool = False, error: float | None = None
    ) -> Iterator[tuple[int, Prediction]]:
        """Predict many clips, as they are ready.

        Args:
            clips: see :meth:`predict`.
            reject: the same.
            error: give each a set of labels too, see :meth:`predict_sets`.

        Yields:
            The index of each clip, those of a folder in the order of their paths, and its prediction; that of a clip
            that can't be read has an ``error``.

        Raises:
            UserError: there is no threshold, or no calibration.
        """
        sets = None if error is None else self._sets(error)
        return self._classify(list_clips(clips)[0], self._check_fitted(), self._rejecting(reject), sets)

    def _classify(
        self, clips: Sequence[Clip], scorer: ClassScorer, threshold: float | None, sets: _Sets | None
    ) -> Iterator[tuple[int, Prediction]]:
        for batch in self.encoder.encode(clips):
            readable = [(index, found.features) for index, found in batch if isinstance(found, Encoded)]
            if readable:
                paths = [name_of(clips[index]) for index, _ in readable]
                features = torch.stack([f for _, f in readable])
                predictions = self._label(scorer, paths, features, threshold)
                if sets is not None:
                    of_clips = self._label_sets(sets, features)
                    predictions = [p._replace(labels=s) for p, s in zip(predictions, of_clips, strict=True)]
                yield from zip([index for index, _ in readable], predictions, strict=True)
            for index, found in batch:
                if isinstance(found, Unreadable):
                    yield index, Prediction(name_of(clips[index]), None, math.nan, {}, math.nan, str(found))

    @torch.no_grad()
    def _label(
        self, scorer: ClassScorer, paths: Sequence[str], features: Tensor, threshold: float | None
    ) -> list[Prediction]:
        """Predict clips by their features ``(n, frames, dim)``."""
        log_probabilities, distances = scorer.label(features)
        rows = zip(paths, log_probabilities.exp().tolist(), distances.amin(-1).tolist(), strict=True)
        predictions = []
        for path, row, distance in rows:
            probabilities = dict(zip(self._classes, row, strict=True))
            label = max(probabilities, key=probabilities.__getitem__)
            if threshold is not None and distance > threshold:
                predictions.append(Prediction(path, NONE_OF_THESE, math.nan, probabilities, distance))
            else:
                predictions.append(Prediction(path, label, probabilities[label], probabilities, distance))
        return predictions

    @torch.no_grad()
    def _label_sets(self, sets: _Sets, features: Tensor) -> list[tuple[str, ...]]:
        """The labels that fit clips, by their features ``(n, frames, dim)``, the likeliest first."""
        logits, scores = sets.scorer.scores(features)
        misfits, names = nonconformity(scores), list(self._classes)
        is_none = SCORES[sets.score](logits.double()) <= sets.thresholds.unknown
        found = []
        for row, order, none in zip(misfits.tolist(), misfits.argsort(stable=True).tolist(), is_none, strict=True):
            labels = [names[c] for c in order if row[c] <= sets.thresholds.known]
            found.append((*labels, NONE_OF_THESE) if none else tuple(labels))
        return found

    def _rejecting(self, reject: bool) -> float | None:
        if reject and self.threshold_ is None:
            raise UserError(
                "one example of one class doesn't tell what is none of these: give it more examples, another class, or"
                " a threshold"
            )
        return self.threshold_ if reject else None

    def segments(
        self,
        video: Clip,
        *,
        window: float = 2.0,
        stride: float | None = None,
        smoothing: float | None = None,
        reject: bool = False,
        fps: float | None = None,
    ) -> list[Segment]:
        """Find what happens when in a long video.

        Windows slide over it, each scored as a clip; a moment has the mean log-probabilities of the windows that it is
        in, smoothed, and the class of the highest. What is shown at a moment is encoded once, however many windows
        share it.

        Args:
            video: a path, uint8 frames ``(frames, height, width, 3)``, or floating features ``(frames, dim)``.
            window: length of a window in seconds; about as long as the examples are.
            stride: seconds from one window to the next, to the nearest multiple of ``window`` over the frames of a
                clip; a quarter of the window by default.
            smoothing: seconds over which scores are averaged; half the window by default.
            reject: leave out moments that are none of the classes, by :attr:`threshold_`.
            fps: frames a second, of frames or features in memory or of a folder of images, which have no times of their
                own.

        Returns:
            Segments in their order, neighbours of different labels; a video shorter than a window has one.

        Raises:
            UserError: the video can't be read, or an option is out of its range.
        """
        scorer, threshold = self._check_fitted(), self._rejecting(reject)
        windows = Windows.of(self.encoder.reader.frames, window, stride, smoothing)
        names, options = list(self._classes), {"fps": fps, "threshold": threshold}
        return find_segments(self.encoder, scorer, names, the_clip(video), windows, **options)

    @torch.no_grad()
    def explain(self, clip: Clip | Encoded, *, reject: bool = False) -> Explanation:
        """Why a clip is taken for what it is, as data; its ``figure()`` draws it.

        Args:
            clip: a path, uint8 frames ``(frames, height, width, 3)``, floating features ``(frames, dim)``, or what
                ``encoder`` makes of a clip. Features have no pixels: nothing shows the frames then.
            reject: see :meth:`predict`.

        Raises:
            UserError: the clip can't be read, or there is no threshold.
        """
        scorer, threshold = self._check_fitted(), self._rejecting(reject)
        clip = clip if isinstance(clip, Encoded) else the_clip(clip)
        clip_encoded = clip if isinstance(clip, Encoded) else self.encoder.encode_one(clip)
        query = clip_encoded.features
        (prediction,) = self._label(scorer, [name_of(clip)], query.unsqueeze(0), threshold)
        output = scorer.score(query.unsqueeze(0))
        compared = [list(self._classes.values())[index] for index in compared_classes(output.logits[0])]
        return explain(
            self.model.model.head,
            output,
            scorer.prototypes,
            query,
            scorer.prompts,
            class_names=list(self._classes),
            label=prediction.label or "",
            probabilities=torch.tensor(list(prediction.probabilities.values())),
            frames=clip_encoded.thumbnail,
            examples={
                c.label: small for c in compared if (small := c.thumbnails[self._closest_example(c, query)]) is not None
            },
            threshold=threshold,
            video=prediction.video,
        )

    def _closest_example(self, own: SupportClass, query: Tensor) -> int:
        """The index of the example that is closest to a clip, each taken for a class of its own."""
        each = ClassScorer(self.model, [own.only(self.model, [i]) for i in range(len(own.features))])
        return int(each.score(query.unsqueeze(0)).logits[0].argmax())

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Save model and classes in a folder, as safetensors and JSON, for :meth:`load`.

        Args:
            folder: a new or an empty one, or that of a classifier, whose place this one takes.

        Raises:
            UserError: it holds something else, or can't be written.
        """
        self._check_fitted()
        folder, reader = Path(folder), self.encoder.reader
        saving.check_folder(folder)
        options = {"text_fusion": self.model.text_fusion, "selection": self.model.model.head.selection}
        require(above=-math.inf, below=math.inf, threshold=self.threshold)
        threshold = None if self.threshold is None else float(self.threshold)
        reading = saving.Reading(reader.frames, reader.resize, options, threshold)
        saving.write_classifier(folder, self.model, list(self._classes.values()), reading, self.calibration)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        device: str | None = None,
        threshold: float | None = None,
        precision: str | None = None,
        workers: int = 0,
        timeout: float = 60.0,
        **options: Any,
    ) -> Self:
        """Load what :meth:`save` wrote; nothing in it is executed.

        Args:
            folder: where it is.
            device: see :meth:`from_checkpoint`.
            threshold: see :class:`FewShotClassifier`; the saved one by default, if one was set.
            precision: see :class:`FewShotClassifier`.
            workers: the same.
            timeout: the same.
            **options: of the model, see :meth:`from_checkpoint`; they win over the saved ones.

        Raises:
            UserError: there is no classifier there, or it is damaged.
        """
        saved, reading = saving.read_support(Path(folder))
        model = placed(CLIPM2DF.from_pretrained(folder, **(reading.options | options)), device)
        threshold = reading.threshold if threshold is None else threshold
        resize = reading.resize if model.image_size else None
        known: dict[str, Any] = {"frames": reading.frames, "resize": resize, "threshold": threshold}
        classifier = cls(model, precision=precision, workers=workers, timeout=timeout, **known)
        shape = (reading.frames, dim := model.model.backbone.dim)
        for c in saved:
            pictures = [len(small) for small in c.thumbnails if small is not None]
            prompt = (dim,) if c.prompt is None else tuple(c.prompt.shape)
            if tuple(c.features.shape[1:]) != shape or {*pictures} - {reading.frames} or prompt != (dim,):
                raise UserError(
                    f"the classifier in {folder} is damaged (its features are not of its model): fit it again"
                )
        classifier._take({c.label: SupportClass.of(model, *c) for c in saved}, classifier.encoder)
        return classifier
