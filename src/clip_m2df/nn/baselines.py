"""Baselines behind the interface of a head, simpler ways to score the same episodes; and every head by its name."""

import difflib
import importlib
import inspect
import os
import sys
from abc import abstractmethod
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
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


class ShotsHead(Head):
    """A head that keeps the mean of a video's frames, and of a class each of its shots.

    Args:
        dim: see :class:`clip_m2df.nn.head.Head`.
        top_k: the same.
        temperature: the same.
    """

    trained = False

    def embed(self, videos: Tensor, prompt: Tensor | None) -> Embedded:
        """The mean of the frame features, ``(…, dim)``."""
        return Embedded(mean=at_least_float32(videos).mean(-2))

    def prototype(self, embedded: Embedded, prompts: Tensor) -> Embedded:
        """The shots ``(…, n_shot, dim)``, and which of them are real: all, as long as nothing is padded."""
        shots = embedded["mean"]
        return Embedded(shots=shots, real=torch.ones(shots.shape[:-1], dtype=torch.bool, device=shots.device))


class LinearProbeHead(ShotsHead):
    """Logistic regression on the mean of each video's frames, by scikit-learn: one fit an episode.

    This is the plain transfer learning that temporal few-shot methods are compared with (arXiv 2406.01073). Means are
    scaled to norm 1, as by Tian et al. (ECCV 2020, arXiv 2003.11539). The logits are the linear scores, which have no
    bound: distances, minus the logits, may be negative. The fit passes on no gradient, so that the head is for
    evaluations alone.
    Note: of two classes scikit-learn fits one vector of weights, for the second against the first; each class gets half
    of it.

    Args:
        dim: see :class:`clip_m2df.nn.head.Head`.
        c: scikit-learn's C, the weight of the loss, a sum over the shots, beside half the sum of the squared weights.
        top_k: see :class:`clip_m2df.nn.head.Head`.
        temperature: the same.

    Raises:
        UserError: scikit-learn is not installed, or an option is out of its range.
    """

    uses_prompts = False
    task_specific = True
    differentiable = False

    def __init__(self, *, dim: int, c: float = 1.0, top_k: int = 4, temperature: float = 200.0) -> None:
        super().__init__(dim=dim, top_k=top_k, temperature=temperature)
        require(above=0, c=c)
        if find_spec("sklearn") is None:
            raise UserError("linear_probe needs scikit-learn: pip install clip-m2df[probe], or take another head")
        self.c = c

    @torch.no_grad()
    def match(self, query: Embedded, prototypes: Embedded, selected: SelectedPrompts) -> HeadOutput:
        """Fit the shots of each episode, and score its queries."""
        shots, real = F.normalize(prototypes["shots"], dim=-1), prototypes["real"]
        episodes = zip(shots.reshape(-1, *shots.shape[-3:]), real.reshape(-1, *real.shape[-2:]), strict=True)
        weights = torch.stack([self._fit(*episode) for episode in episodes]).to(shots)
        return HeadOutput.of(self._score(query["mean"], weights.view(*shots.shape[:-2], -1)), selected)

    @full_precision
    def _score(self, videos: Tensor, weights: Tensor) -> Tensor:
        """Linear scores of ``videos (…, n_queries, dim)`` by ``weights (…, n_way, dim + 1)``, intercepts last."""
        return F.normalize(videos, dim=-1) @ weights[..., :-1].mT + weights[..., -1].unsqueeze(-2)

    def _fit(self, shots: Tensor, real: Tensor) -> Tensor:
        """Weights and intercept ``(n_way, dim + 1)`` of the ``shots (n_way, n_shot, dim)`` that are real."""
        from sklearn.linear_model import LogisticRegression

        n_way = len(shots)
        if not shots.isfinite().all():  # which scikit-learn refuses, as it does a single class
            return shots.new_full((n_way, shots.shape[-1] + 1), torch.nan)
        if n_way == 1:
            return shots.new_zeros(1, shots.shape[-1] + 1)
        fitted = LogisticRegression(C=self.c, max_iter=1000)
        fitted.fit(shots[real].double().cpu().numpy(), real.nonzero()[:, 0].cpu().numpy())
        weights = torch.cat((torch.from_numpy(fitted.coef_), torch.from_numpy(fitted.intercept_)[:, None]), 1)
        return torch.cat((-weights, weights)) / 2 if n_way == 2 else weights


class TipAdapterHead(ShotsHead):
    """The prompts' logits and a cache of the support, without training (Zhang et al., ECCV 2022, arXiv 2207.09519).

    A class's logit is ``100 cos(x, prompt) + α mean exp(−β (1 − cos(x, shot)))``, the mean over its shots; x is the
    mean of the query's frames.
    Note: the published code adds up the shots. Here their mean is taken, so that no class wins by its number of
    examples: with n shots, n times the published α gives the published logits, but for the 0.01 in the cosine. The
    published code chooses α and β on val; the defaults are the values at which it starts for UCF101.

    Args:
        dim: see :class:`clip_m2df.nn.head.Head`.
        alpha: α, the weight of the cache.
        beta: β, how fast a shot's part falls with its distance.
        top_k: see :class:`clip_m2df.nn.head.Head`.
        temperature: the same.

    Raises:
        UserError: an option out of its range.
    """

    logit_scale = 100.0

    def __init__(
        self, *, dim: int, alpha: float = 3.0, beta: float = 1.0, top_k: int = 4, temperature: float = 200.0
    ) -> None:
        super().__init__(dim=dim, top_k=top_k, temperature=temperature)
        require(least=0, alpha=alpha)
        require(above=0, beta=beta)
        self.alpha = alpha
        self.beta = beta

    def prototype(self, embedded: Embedded, prompts: Tensor) -> Embedded:
        """The shots, and the class's prompt."""
        return Embedded(super().prototype(embedded, prompts), prompt=at_least_float32(prompts))

    def match(self, query: Embedded, prototypes: Embedded, selected: SelectedPrompts) -> HeadOutput:
        """Add up the prompt's logit and the cache's."""
        videos, shots, real = query["mean"], prototypes["shots"], prototypes["real"].unsqueeze(-3)
        text = self.logit_scale * cosine(videos, prototypes["prompt"])
        affinity = cosine(videos, shots.flatten(-3, -2)).unflatten(-1, shots.shape[-3:-1])
        cache = ((-self.beta * (1 - affinity)).exp() * real).sum(-1) / real.sum(-1)
        return HeadOutput.of(text + self.alpha * cache, selected)

    def least_distance(self, frames: int, view: str = "") -> float:
        """Minus the sum of both weights: a cosine is 1 at most."""
        return -self.logit_scale - self.alpha


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
    "linear_probe": "clip_m2df.nn.baselines.LinearProbeHead",
    "tip_adapter": "clip_m2df.nn.baselines.TipAdapterHead",
    "trx": "clip_m2df.nn.trx.TRXHead",
    "ts_fsar": "clip_m2df.nn.ts_fsar.TSFSARHead",
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
        if value is None and kind in (int, float, "int", "float"):  # which a check of a range takes for not given
            raise UserError(f"head_options: {option} is null; it must be a number, or be left out")
    try:
        return cls(**options)
    except UserError:
        raise
    except (TypeError, ValueError, OverflowError, MemoryError, RuntimeError) as error:  # torch's where memory ends
        why = " ".join(str(error).split())  # below which torch may put where in its own code
        raise UserError(f"head_options: {cls.__name__} does not take {dict(options)!r:.200}: {why:.200}") from error


def options_of(cls: type[Head]) -> tuple[str, ...]:
    """Names of the options of a head's class."""
    return tuple(inspect.signature(cls).parameters)
