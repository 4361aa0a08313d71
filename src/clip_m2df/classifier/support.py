"""The classes of a classifier and their examples, and how clips are scored against them."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from clip_m2df.classifier.clips import Clip, ClipEncoder, Encoded, Unreadable, name_of, unique
from clip_m2df.datasets.manifest import class_key, readable
from clip_m2df.errors import UserError, some
from clip_m2df.nn.head import HeadOutput
from clip_m2df.nn.m2df import M2DFHead, has_stages
from clip_m2df.nn.views import FusedSequence
from clip_m2df.training.module import CLIPM2DF

# Said of a clip that is too far from every class.
NONE_OF_THESE = "none of these"
# How many clips are scored at once.
QUERIES = 64
# Examples, repeated to as many a class, that a head may be given.
MOST_REPEATED = 10_000


@dataclass(frozen=True)
class SupportClass:
    """A class and its examples.

    Attributes:
        label: its name.
        text: what the prompt says.
        examples: paths of the examples; empty for frames that were in memory.
        features: ``(n_shot, frames, dim)``.
        thumbnails: uint8 ``(n_shot, frames, 3, height, width)``, small frames of them.
        prompt: ``(dim)``, the embedding of the class's prompt.
        fused: of a head with stages, the examples' fused sequences ``(n_shot, …)`` in each view.
    """

    label: str
    text: str
    examples: tuple[str, ...]
    features: Tensor
    thumbnails: Tensor
    prompt: Tensor
    fused: Mapping[str, FusedSequence] | None

    @classmethod
    @torch.no_grad()
    def of(
        cls, model: CLIPM2DF, label: str, text: str, examples: Sequence[str], features: Tensor, thumbnails: Tensor
    ) -> SupportClass:
        """A class as a model sees it; see the attributes."""
        features = features.to(model.device)
        prompt = model.encode_prompts([text])[0]
        fused = None
        if has_stages(model.model.head):
            fused = cast(M2DFHead, model.model.head).fuse(features, prompt.expand(len(features), -1))
        return cls(label, text, tuple(examples), features, thumbnails, prompt, fused)

    @classmethod
    def from_encoded(
        cls,
        model: CLIPM2DF,
        label: str,
        clips: Sequence[Clip],
        encoded: Sequence[Encoded | Unreadable],
        text: str | None,
    ) -> SupportClass:
        """A class by its examples. Those that can't be read are named in a warning, and left out.

        Args:
            model: in eval mode.
            label: the name of the class.
            clips: its examples.
            encoded: the same as the model sees them.
            text: what the prompt says, where that is not the name in plain words.

        Raises:
            UserError: no example can be read.
        """
        named = list(zip(clips, encoded, strict=True))
        broken = [
            f"{name_of(clip) or f'array {place}'} ({found})"
            for place, (clip, found) in enumerate(named)
            if isinstance(found, Unreadable)
        ]
        kept = [(name_of(clip), found) for clip, found in named if isinstance(found, Encoded)]
        if not kept:
            raise UserError(f"no example of the class {label!r} can be read: {some(broken)}; give one that can")
        if broken:
            warnings.warn(
                f"examples of the class {label!r} that can't be read are left out: {some(broken)}", stacklevel=4
            )
        features = torch.stack([example.features for _, example in kept])
        thumbnails = torch.stack([example.thumbnail for _, example in kept])
        text = readable(label) if text is None else text
        return cls.of(model, label, text, [name for name, _ in kept], features, thumbnails)

    def changed(self, model: CLIPM2DF, text: str | None, more: SupportClass | None = None) -> SupportClass:
        """The same class with another text, if there is one, and with the examples of another class too."""
        parts = [self] if more is None else [self, more]
        return SupportClass.of(
            model,
            self.label,
            self.text if text is None else text,
            [example for part in parts for example in part.examples],
            torch.cat([part.features for part in parts]),
            torch.cat([part.thumbnails for part in parts]),
        )

    def only(self, places: Sequence[int]) -> SupportClass:
        """The same class with some of its examples."""
        kept = list(places)
        fused = self.fused and {
            view: FusedSequence(*(part[kept] for part in parts)) for view, parts in self.fused.items()
        }
        return dataclasses.replace(
            self,
            examples=tuple(self.examples[i] for i in kept),
            features=self.features[kept],
            thumbnails=self.thumbnails[kept],
            fused=fused,
        )


def check_names(label: object, text: object) -> None:
    """Refuse a class's name, or what its prompt says, that is none.

    Raises:
        UserError: names it.
    """
    if label == NONE_OF_THESE:
        raise UserError(f"a class can't be called {label!r}, which is said of clips of no class: rename it")
    for what, value in (("be called", label), ("have the text", text)):
        # Bytes that are no UTF-8, in a folder's name, are no text for a prompt or a table.
        if not isinstance(value, str) or not value.strip() or any("\ud800" <= letter <= "\udfff" for letter in value):
            raise UserError(f"a class can't {what} {value!r}: give it a name in plain text")


def make_classes(
    encoder: ClipEncoder, examples: Mapping[str, Sequence[Clip]], texts: Mapping[str, str]
) -> dict[str, SupportClass]:
    """Classes by their names, all of their examples read together.

    Args:
        encoder: of the clips.
        examples: the clips of each class.
        texts: what prompts say, where that is not the name in plain words.

    Raises:
        UserError: a name that is none, or a class without an example that can be read.
    """
    examples = {label: unique(clips) for label, clips in examples.items()}
    for label, clips in examples.items():
        check_names(label, texts.get(label, label))
        if not clips:
            raise UserError(f"the class {label!r} has no examples: give one or more")
    every = [clip for clips in examples.values() for clip in clips]
    found = {place: encoded for batch in encoder.encode(every) for place, encoded in batch}
    classes, first = {}, 0
    for label, clips in examples.items():
        encoded = [found[place] for place in range(first, first + len(clips))]
        classes[label] = SupportClass.from_encoded(encoder.model, label, clips, encoded, texts.get(label))
        first += len(clips)
    return classes


def check_disjoint(classes: Iterable[SupportClass]) -> None:
    """Refuse an example that is of two classes, and two spellings of one class.

    Raises:
        UserError: names it.
    """
    owners: dict[str, str] = {}
    spellings: dict[str, str] = {}
    for c in classes:
        if (other := spellings.setdefault(class_key(c.label), c.label)) != c.label:
            raise UserError(f"{other!r} and {c.label!r} are spellings of one class: give their examples one name")
        for path in filter(None, c.examples):
            if (owner := owners.setdefault(os.path.realpath(path), c.label)) != c.label:
                raise UserError(f"{path} is an example of both {owner!r} and {c.label!r}: leave it to one of them")


def averages_shots(model: CLIPM2DF) -> bool:
    """Whether the model's head goes by the mean of a class's shots, and by each class alone."""
    return bool(getattr(model.model.head, "averages_shots", False))


class Scorer:
    """Scores clips against classes, each with any number of examples.

    The method's prototype is the mean over a class's own examples, and so is that of the baselines. Another head takes
    as many examples of every class: each class's are repeated up to their least common multiple, so that each counts
    the same.

    Args:
        model: in eval mode.
        classes: at least one.

    Attributes:
        prompts: ``(n_way, dim)``.
        prototype: of a head with stages, ``(n_way, …)`` in each view.

    Raises:
        UserError: numbers of examples that have no reasonable common multiple, for a head that takes as many
            of every class.
    """

    def __init__(self, model: CLIPM2DF, classes: Sequence[SupportClass]) -> None:
        self.model = model
        self.prompts = torch.stack([c.prompt for c in classes])
        self.prototype: dict[str, FusedSequence] | None = None
        if has_stages(model.model.head):
            head = cast(M2DFHead, model.model.head)
            prototypes = [head.prototype(c.fused) for c in classes if c.fused]
            self.prototype = {
                view: FusedSequence(*map(torch.stack, zip(*(p[view] for p in prototypes), strict=True)))
                for view in prototypes[0]
            }
        counts = [len(c.features) for c in classes]
        if self.prototype is not None or averages_shots(model):
            self.support = torch.stack([c.features.mean(0, keepdim=True) for c in classes])
            return
        shots = math.lcm(*counts)
        if shots * len(classes) > MOST_REPEATED:
            raise UserError(
                f"the head {type(model.model.head).__name__} takes as many examples of every class, and"
                f" {', '.join(map(str, sorted(set(counts))))} have no common multiple that is small enough: give the"
                " classes the same number of examples"
            )
        self.support = torch.stack([c.features.repeat(shots // len(c.features), 1, 1) for c in classes])

    def score(self, query: Tensor) -> HeadOutput:
        """What the head says of clips, ``query (n, frames, dim)``."""
        head = cast(M2DFHead, self.model.model.head)
        if self.prototype is None:
            output: HeadOutput = head(self.support, query, self.prompts)
            return output
        probabilities = head.prompt_probabilities(head.prompt_scores(query, self.prompts))
        selected = head.select(probabilities, self.prompts)
        evidence = head.match(head.fuse(query, selected.embeddings), self.prototype)
        return head.conclude(evidence, probabilities, selected.indices)

    def log_probabilities(self, output: HeadOutput, query: Tensor) -> Tensor:
        """Logarithms of the classes' probabilities ``(n, n_way)``, from what :meth:`score` said of ``query``."""
        scores = self.model.fuse_text(output.logits, self.support, query, self.prompts)
        return scores.float().log_softmax(-1)

    def label(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities ``(n, n_way)`` and distances ``(n, n_way)`` of many clips, ``query (n, frames, dim)``."""
        scored = []
        for chunk in query.split(QUERIES):
            output = self.score(chunk)
            scored.append((self.log_probabilities(output, chunk), -output.logits))
        log_probabilities, distances = (torch.cat(column) for column in zip(*scored, strict=True))
        return log_probabilities, distances
