"""Baselines behind the interface of a head, simpler ways to score the same episodes; and every head by its name."""

import difflib
import importlib
import inspect
import os
import sys
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clip_m2df.errors import UserError, require
from clip_m2df.nn.head import Embedded, Head, HeadOutput
from clip_m2df.nn.matching import at_least_float32, cosine, frame_costs, full_precision, otam
from clip_m2df.nn.prompts import SelectedPrompts
from clip_m2df.nn.views import FusionEncoder


class Baseline(Head):
    """A head without views: it keeps frames as they are and averages shots. PPS runs for the log alone.

    Args:
        dim: see :class:`clip_m2df.nn.head.Head`.
        top_k: the same.
        temperature: the same.
    """

    trained = False
    uses_prompts = False

    def embed(self, videos: Tensor, prompt: Tensor | None) -> Embedded:
        """The frame features themselves."""
        return Embedded(frames=videos)

    def prototype(self, embedded: Embedded, prompts: Tensor) -> Embedded:
        """The mean of the shots, frame by frame."""
        # In float32: what comes of bfloat16 features is not rounded again.
        return embedded.map(lambda frames: at_least_float32(frames).mean(-3))

    def match(self, query: Embedded, prototypes: Embedded, selected: SelectedPrompts) -> HeadOutput:
        """Score the queries; there is nothing to distil."""
        return HeadOutput.of(self.compare(query["frames"], prototypes["frames"]), selected)

    @abstractmethod
    def compare(self, query: Tensor, prototypes: Tensor) -> Tensor:
        """Logits ``(…, n_queries, n_way)`` of ``query (…, n_queries, frames, dim)``.

        Args:
            query: the queries' frames.
            prototypes: ``(…, n_way, frames, dim)``, or as the head's own ``prototype`` makes them.
        """


class NearestPrototypeHead(Baseline):
    """The class whose mean is nearest (Snell et al., Prototypical Networks, NeurIPS 2017), by cosine.

    A query is the mean of its frames, a class that of all frames of all its shots.
    Note: the paper measures squared Euclidean distances; CLIP's features are made to be compared by cosine.

    """

    # It leaves the predictions alone; without it a softmax over cosines, which differ by little, would hardly teach a
    # tower.
    logit_scale = 10.0

    @full_precision
    def compare(self, query: Tensor, prototypes: Tensor) -> Tensor:
        """See :meth:`Baseline.compare`."""
        return self.logit_scale * cosine(query.mean(-2), prototypes.mean(-2))

    def least_distance(self, frames: int, view: str = "") -> float:
        """Minus the scale: a cosine is 1 at most."""
        return -self.logit_scale


class OTAMHead(Baseline):
    """OTAM on the tower's own features (Cao et al., CVPR 2020, arXiv 1906.11415): minus the distance.

    A class's prototype is the mean of its shots, frame by frame.
    Note: a public implementation takes the mean of the shots' distances instead; here the shots are averaged as by the
    other heads, so that heads differ by what they compare alone.

    Args:
        dim: see :class:`clip_m2df.nn.head.Head`.
        smoothing: λ of OTAM's soft minimum.
        single_direction: match one way, not both.
        top_k: see :class:`clip_m2df.nn.head.Head`.
        temperature: the same.

    Raises:
        UserError: an option out of its range.
    """

    def __init__(
        self,
        *,
        dim: int,
        smoothing: float = 0.5,
        single_direction: bool = False,
        top_k: int = 4,
        temperature: float = 200.0,
    ) -> None:
        super().__init__(dim=dim, top_k=top_k, temperature=temperature)
        require(above=0, smoothing=smoothing)
        self.smoothing = smoothing
        self.single_direction = single_direction

    def compare(self, query: Tensor, prototypes: Tensor) -> Tensor:
        """Minus OTAM's distances, see :meth:`Baseline.compare`."""
        costs = frame_costs(query, prototypes)
        return -otam(costs, smoothing=self.smoothing, single_direction=self.single_direction)

    def least_distance(self, frames: int, view: str = "") -> float:
        """OTAM's distance where no frame costs anything."""
        costs = torch.zeros(frames, frames)
        return float(otam(costs, smoothing=self.smoothing, single_direction=self.single_direction))


class ZeroShotHead(Baseline):
    """CLIP's prompts alone (Radford et al., ICML 2021, arXiv 2103.00020): the support is not looked at.

    A query's score is the mean, over its frames, of their cosines with the class's prompt.
    """

    uses_prompts = True
    # CLIP's own: its temperature was learnt up to the bound of 1/100.
    logit_scale = 100.0

    def prototype(self, embedded: Embedded, prompts: Tensor) -> Embedded:
        """The class's prompt ``(…, 1, dim)``; its shots do not count."""
        return Embedded(frames=prompts.unsqueeze(-2))

    @full_precision
    def compare(self, query: Tensor, prototypes: Tensor) -> Tensor:
        """See :meth:`Baseline.compare`."""
        return self.logit_scale * cosine(query, prototypes.transpose(-2, -3)).mean(-2)

    def least_distance(self, frames: int, view: str = "") -> float:
        """Minus the scale: a cosine is 1 at most."""
        return -self.logit_scale


class BiMHMHead(Baseline):
    """The bidirectional mean Hausdorff metric of HyRSM (Wang et al., CVPR 2022, arXiv 2204.13423), on raw features.

    Each frame is compared with the nearest one of the other video, whatever their order: the mean over the query's
    frames, and that over the prototype's (the mean of the shots), are added. The logits are minus that.
    Note: the published code adds up the frames. All videos having as many, the mean of the paper ranks classes alike.
    """

    @full_precision
    def compare(self, query: Tensor, prototypes: Tensor) -> Tensor:
        """See :meth:`Baseline.compare`."""
        costs = frame_costs(query, prototypes)
        return -(costs.amin(-1).mean(-1) + costs.amin(-2).mean(-1))


class CLIPFSARHead(OTAMHead):
    """CLIP-FSAR on frame features and prompt embeddings (Wang et al., IJCV 2023, arXiv 2303.02982).

    One transformer over prompt and frames, then OTAM. Its video-text loss is the model's ``class_weight``, its fusion
    with the text's probabilities ``text_fusion``.
    Note: the published code can fuse with ``softmax(−d/8)`` and an exact cosine; none of its configs does. The model
    fuses with ``softmax(−d)`` and the cosine of the training, the same for every head. A β of 0.9 there is 72/73 here,
    but for the 0.01 in the cosine.

    Args:
        dim: width of the features, a multiple of ``num_heads``.
        depth: layers of the transformer.
        num_heads: its attention heads.
        hidden_dim: width inside its feed-forward parts.
        attention_dropout: dropout after its attention.
        dropout: dropout in its feed-forward parts.
        smoothing: λ of OTAM's soft minimum.
        single_direction: match each query with a prototype by OTAM one way, not both.
        top_k: frames that count in a prompt's score, for the log alone.
        temperature: of PPS's softmax, for the log alone.

    Raises:
        UserError: an option out of its range, with what it may be.
    """

    trained = True
    uses_prompts = True

    def __init__(
        self,
        *,
        dim: int,
        depth: int = 1,
        num_heads: int = 8,
        hidden_dim: int = 2048,
        attention_dropout: float = 0.2,
        dropout: float = 0.05,
        smoothing: float = 0.5,
        single_direction: bool = False,
        top_k: int = 4,
        temperature: float = 200.0,
    ) -> None:
        super().__init__(
            dim=dim, smoothing=smoothing, single_direction=single_direction, top_k=top_k, temperature=temperature
        )
        require(above=0, hidden_dim=hidden_dim)
        require(least=0, below=1, attention_dropout=attention_dropout, dropout=dropout)
        self.transformer = FusionEncoder(dim, depth, num_heads, hidden_dim, attention_dropout, dropout)

    def embed(self, videos: Tensor, prompt: Tensor | None) -> Embedded:
        """A query, whose class nobody knows, goes through the transformer by itself; shots are averaged before it."""
        return Embedded(frames=self.attend(videos) if prompt is None else videos)

    def prototype(self, embedded: Embedded, prompts: Tensor) -> Embedded:
        """The mean of the shots, beside the class's prompt through the transformer."""
        # Note: shots are averaged before the transformer, as the published 5-shot configs have it (MERGE_BEFORE); their
        # code can do so after it too. With one shot both are the same.
        frames = embedded["frames"].mean(-3)
        token = prompts.to(frames.dtype).unsqueeze(-2)
        return Embedded(frames=self.attend(torch.cat((token, frames), -2))[..., 1:, :])

    def attend(self, tokens: Tensor) -> Tensor:
        """Self-attention among ``tokens (…, tokens, dim)``, which have no positions: the same shape."""
        attended = tokens.reshape(-1, *tokens.shape[-2:])
        for layer in self.transformer.layers:
            attended = layer(attended, attended)
        return attended.reshape(tokens.shape)

    def class_logits(self, videos: Tensor, prompts: Tensor, prompt_table: Tensor) -> Tensor:
        """As :meth:`clip_m2df.nn.head.Head.class_logits`, but a video stands by the mean of all its frames."""
        return self.scaled_cosine(videos, prompt_table)


HEADS = {
    "m2df": "clip_m2df.nn.m2df.M2DFHead",
    "nearest_prototype": "clip_m2df.nn.baselines.NearestPrototypeHead",
    "otam": "clip_m2df.nn.baselines.OTAMHead",
    "zero_shot": "clip_m2df.nn.baselines.ZeroShotHead",
    "bi_mhm": "clip_m2df.nn.baselines.BiMHMHead",
    "clip_fsar": "clip_m2df.nn.baselines.CLIPFSARHead",
}


def check_asked_for(name: str, asked: str | None, source: str | os.PathLike[str], option: str) -> None:
    """Refuse to import other people's code because a file names it as its head.

    Args:
        name: the head that the file names.
        asked: the head that a person asked for.
        source: the file.
        option: how a person asks on the command line.

    Raises:
        UserError: it is neither this package's nor asked for, nor imported already, and so trusted.
    """
    if name not in HEADS and name != asked and name.rpartition(".")[0] not in sys.modules:
        raise UserError(
            f"{source} takes the head {name!r}, code that is not this package's: if you trust it, name it yourself, by"
            f" {option} {name} or head={name!r}"
        )


def head_class(name: str) -> type[Head]:
    """The class of a head.

    Args:
        name: a key of ``HEADS``, or a class path ``package.module.Class``.

    Raises:
        UserError: there is no such head, or its class is not what a head's has to be.
    """
    path = HEADS.get(name, name)
    module, _, attribute = path.rpartition(".")
    if not module:
        near = difflib.get_close_matches(name, HEADS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(
            f"head: {name!r} is neither one of {', '.join(HEADS)} nor a class path like package.module.Class{hint}"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"head: {name!r} can't be imported ({error}); check the class path") from error
    what = "derive it from clip_m2df.nn.head.Head and write its steps, embed, prototype and match"
    if not (isinstance(found, type) and issubclass(found, Head)):
        raise UserError(f"head: {name!r} is no head: {what}")
    if found.forward is not Head.forward:
        raise UserError(f"head: {name!r} has a forward of its own, which a bank would pass over: leave it out, {what}")
    if missing := sorted(found.__abstractmethods__):
        raise UserError(f"head: {name!r} has no {' and no '.join(missing)}: {what}")
    return found


def build_head(name: str, options: Mapping[str, Any]) -> Head:
    """Make a head.

    Args:
        name: see :func:`head_class`.
        options: keyword options of the class.

    Raises:
        UserError: an option that the class doesn't have, with the nearest that it has.
    """
    cls = head_class(name)
    known = options_of(cls)
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
            raise UserError(f"head_options: {cls.__name__} has no option {option!r}; {hint}")
    for option, value in options.items():  # any text would be as good as true
        kind = inspect.signature(cls).parameters[option].annotation
        if kind in (bool, "bool") and value not in (True, False):
            raise UserError(f"head_options: {option} is {value!r:.80}; it must be true or false")
    try:
        return cls(**options)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"head_options: {cls.__name__} does not take {dict(options)!r:.200}: {error}") from error


def options_of(cls: type[Head]) -> tuple[str, ...]:
    """Names of the options of a head's class."""
    return tuple(inspect.signature(cls).parameters)
