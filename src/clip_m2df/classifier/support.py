"""The classes of a classifier and their examples, and how clips are scored against them."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clip_m2df.classifier.clips import Clip, ClipEncoder, Encoded, TableRow, name_of, unique
from clip_m2df.datasets.manifest import class_key, readable
from clip_m2df.errors import UserError, some
from clip_m2df.files import file_of
from clip_m2df.nn.class_text import fuse_text
from clip_m2df.nn.head import Embedded, HeadOutput
from clip_m2df.nn.weights import check_finite
from clip_m2df.training.module import CLIPM2DF
from clip_m2df.video.isolation import Unreadable

# Said of a clip that is too far from every class.
NONE_OF_THESE = "none of these"
# How many clips are scored at once: at most so many, and so many pairs of frames of a clip and a class.
QUERIES, CELLS = 64, 2**22


@dataclass(frozen=True)
class SupportClass:
    """A class and its examples.

    Attributes:
        label: its name.
        text: what the prompt says; None where its embedding came with the class, in a feature table.
        examples: paths of the examples; empty for what was in memory.
        features: ``(n_shot, frames, dim)``.
        thumbnails: of each example, uint8 ``(frames, 3, height, width)``, small frames; None of what came as features.
        prompt: ``(dim)``, the embedding of the class's prompt.
        embedded: what the head keeps of the examples, ``(n_shot, …)``.
        prototype: what the class is to the head.
    """

    label: str
    text: str | None
    examples: tuple[str, ...]
    features: Tensor
    thumbnails: tuple[Tensor | None, ...]
    prompt: Tensor
    embedded: Embedded
    prototype: Embedded

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        model: CLIPM2DF,
        label: str,
        text: str | None,
        examples: Sequence[str],
        features: Tensor,
        thumbnails: Iterable[Tensor | None],
        prompt: Tensor | None = None,
    ) -> SupportClass:
        """A class as a model sees it; see the attributes. The prompt is given where there is no text."""
        features = features.to(model.device)
        if prompt is None and not model.image_size and not model.model.without_prompts:
            prompt = torch.zeros(features.shape[-1])  # it has those of its training alone, and needs none
        elif prompt is None:
            assert text is not None
            prompt = model.encode_prompts([text])[0]
        prompt = prompt.to(model.device)
        embedded = model.model.head.embed(features, prompt.expand(len(features), -1))
        prototype = model.model.head.prototype(embedded, prompt)
        for tensor in (prompt, *prototype.values()):
            check_finite(tensor, f"{model.source} on the class {label!r}")
        return cls(label, text, tuple(examples), features, tuple(thumbnails), prompt, embedded, prototype)

    @classmethod
    def from_encoded(
        cls,
        model: CLIPM2DF,
        label: str,
        clips: Sequence[Clip],
        encoded: Sequence[Encoded | Unreadable],
        text: str | None,
        prompt: Tensor | None,
    ) -> SupportClass:
        """A class by its examples. Those that can't be read are named in a warning, and left out.

        Args:
            model: in eval mode.
            label: the name of the class.
            clips: its examples.
            encoded: the same as the model sees them.
            text: what the prompt says, where that is not the name in plain words.
            prompt: its embedding, where there is one in the place of a text.

        Raises:
            UserError: no example can be read.
        """
        named = list(zip(clips, encoded, strict=True))
        broken = [
            f"{name_of(clip) or f'array {number}'} ({found})"
            for number, (clip, found) in enumerate(named)
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
        thumbnails = [example.thumbnail for _, example in kept]
        if text is None and prompt is None:
            text = readable(label) if model.image_size else label  # of features, labels stand for prompts
        return cls.of(model, label, text, [name for name, _ in kept], features, thumbnails, prompt)

    def changed(self, model: CLIPM2DF, text: str | None, more: SupportClass | None = None) -> SupportClass:
        """The same class with another text, if there is one, and with the examples of another class too."""
        parts = [self] if more is None else [self, more]
        return SupportClass.of(
            model,
            self.label,
            self.text if text is None else text,
            [example for part in parts for example in part.examples],
            torch.cat([part.features for part in parts]),
            [thumbnail for part in parts for thumbnail in part.thumbnails],
            self.prompt if text is None and self.text is None else None,
        )

    def only(self, model: CLIPM2DF, indices: Sequence[int]) -> SupportClass:
        """The same class with some of its examples."""
        kept = list(indices)
        embedded = self.embedded.map(lambda tensor: tensor[kept])
        return dataclasses.replace(
            self,
            examples=tuple(self.examples[i] for i in kept),
            features=self.features[kept],
            thumbnails=tuple(self.thumbnails[i] for i in kept),
            embedded=embedded,
            prototype=model.model.head.prototype(embedded, self.prompt),
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
    encoder: ClipEncoder,
    examples: Mapping[str, Sequence[Clip]],
    texts: Mapping[str, str],
    prompts: Mapping[str, Tensor] | None = None,
) -> dict[str, SupportClass]:
    """Classes by their names, all of their examples read together.

    Args:
        encoder: of the clips.
        examples: the clips of each class.
        texts: what prompts say, where that is not the name in plain words.
        prompts: their embeddings ``(dim)``, of classes without a text; by default what feature tables have of them.

    Raises:
        UserError: a name that is none, a class without an example that can be read, or a tower without text under a
            head that needs prompts.
    """
    rows = [(label, clip) for label, clips in examples.items() for clip in clips if isinstance(clip, TableRow)]
    of_tables = {label: row.prompt for label, row in reversed(rows) if row.prompt is not None and label not in texts}
    prompts = of_tables | dict(prompts or {})
    if examples.keys() - prompts.keys():
        encoder.model.model.check_has_prompts()
    examples = {label: unique(clips) for label, clips in examples.items()}
    for label, clips in examples.items():
        check_names(label, texts.get(label, label))
        if not clips:
            raise UserError(f"the class {label!r} has no examples: give one or more")
        if len(others := {clip.label: clip.table for clip in clips if isinstance(clip, TableRow)}) > 1:
            raise UserError(
                f"the examples of {label!r} are of several classes in {next(iter(others.values()))}, {some(others)}:"
                " give fit the table by itself, or a table whose rows are all of the class"
            )
    every = [clip for clips in examples.values() for clip in clips]
    found = {index: encoded for batch in encoder.encode(every) for index, encoded in batch}
    classes, first = {}, 0
    for label, clips in examples.items():
        encoded = [found[index] for index in range(first, first + len(clips))]
        of_class = (label, clips, encoded, texts.get(label), prompts.get(label))
        classes[label] = SupportClass.from_encoded(encoder.model, *of_class)
        first += len(clips)
    return classes


def check_disjoint(classes: Iterable[SupportClass]) -> None:
    """Refuse an example that is of two classes, and two spellings of one class.

    Raises:
        UserError: names it.
    """
    owners: dict[Hashable, str] = {}
    spellings: dict[str, str] = {}
    for c in classes:
        if (other := spellings.setdefault(class_key(c.label), c.label)) != c.label:
            raise UserError(f"{other!r} and {c.label!r} are spellings of one class: give their examples one name")
        for path in filter(None, c.examples):
            if (owner := owners.setdefault(file_of(path), c.label)) != c.label:
                raise UserError(f"{path} is an example of both {owner!r} and {c.label!r}: leave it to one of them")


class ClassScorer:
    """Scores clips against classes, each with its own number of examples.

    Args:
        model: in eval mode.
        classes: at least one.

    Attributes:
        prompts: ``(n_way, dim)``.
        prototypes: ``(n_way, …)``.
    """

    def __init__(self, model: CLIPM2DF, classes: Sequence[SupportClass]) -> None:
        self.model = model
        self.prompts = torch.stack([c.prompt for c in classes])
        self.prototypes = Embedded.stack([c.prototype for c in classes])

    def score(self, query: Tensor) -> HeadOutput:
        """The head's output on clips, ``query (n, frames, dim)``.

        Raises:
            UserError: its scores are not finite.
        """
        output = self.model.model.head.score(query, self.prompts, self.prototypes)
        check_finite(output.logits, self.model.source)
        return output

    def label(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities ``(n, n_way)`` and distances ``(n, n_way)`` of many clips, ``query (n, frames, dim)``.

        A distance is 0 for videos whose frames are all the same picture, and grows from there.
        """
        logits, scores = self.scores(query)
        least = self.model.model.head.least_distance(query.shape[-2])
        return scores.float().log_softmax(-1), -logits - least

    def at_once(self, frames: int) -> int:
        """How many queries of a number of frames go through the head together."""
        n_way = len(self.prompts)
        # With each class's prompt a query is embedded as often as there are classes.
        most = QUERIES // n_way if self.model.model.head.query_prompt == "each" else QUERIES
        return max(1, min(most, CELLS // (n_way * frames**2)))

    def scores(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """The head's logits and the scores that tell the class, both ``(n, n_way)``, of ``query (n, frames, dim)``."""
        head, share = self.model.model.head, self.model.text_fusion
        scored = []
        for chunk in query.split(self.at_once(query.shape[-2])):
            logits = self.score(chunk).logits
            scored.append((logits, fuse_text(head, share, logits, chunk, self.prompts)))
        logits, scores = (torch.cat(column) for column in zip(*scored, strict=True))
        return logits, scores
