"""CLIP-M²DF: the head (:class:`M2DFHead`), step by step as in the paper, and the whole model (:class:`M2DF`)."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clip_m2df.errors import UserError, require
from clip_m2df.nn.distillation import CONDITIONS, DIRECTIONS, Direction, ViewOutput, mutual_distillation
from clip_m2df.nn.head import Embedded, Head, HeadOutput, QueryPrompt
from clip_m2df.nn.matching import at_least_float32, frame_costs, otam, otam_alignment, token_cosines
from clip_m2df.nn.prompts import (
    DEFAULT_TEMPLATE,
    SELECTIONS,
    SelectedPrompts,
    Selection,
    check_distinct,
    check_templates,
    ensemble,
    fill_template,
)
from clip_m2df.nn.views import FusionEncoder, GlobalTemporalContext, LocalTemporalContext, View
from clip_m2df.nn.weights import check_weights, published_head, published_state, published_tower
from clip_m2df.weight_files import read_weights

if TYPE_CHECKING:
    from clip_m2df.episode import Episode

CONTEXTS: dict[str, type[nn.Module]] = {"local": LocalTemporalContext, "global": GlobalTemporalContext}
VIEWS = tuple(CONTEXTS)


class M2DFHead(Head):
    """CLIP-M²DF on frame features and prompt embeddings (Guo et al., arXiv 2401.08345, section 3).

    Any leading axes: B episodes run at once.

    Args:
        dim: width of the features, a multiple of ``num_heads``.
        depth: layers of each fusion encoder.
        views: ``("local", "global")``, or one of them (an ablation).
        view_weights: α, the weight of each view's distance, in the order of ``views``; 1 each by default.
        pps: give queries a probability prompt embedding; without it (an ablation) theirs is zero.
        selection: how PPS picks at evaluation: ``argmax``, ``sample`` or ``expectation``; or ``each``, by which nothing
            is picked: a query is fused with each class's prompt, to be compared with that class.
            Note: the published code samples here too; with argmax a test repeats.
        train_selection: how it picks in training.
        reliability: what makes a view the reliable one: any of ``text`` and ``visual``, or nothing.
        direction: which distillation to use: ``local_to_global``, ``global_to_local`` or ``mutual``.
        single_direction: match each query with a prototype by OTAM one way, not both.
        detach_teacher: no gradient through the reliable view's distribution and the weights.
        top_k: frames that count in a prompt's score.
        temperature: of PPS's softmax.
        smoothing: λ of OTAM's soft minimum.
        num_heads: attention heads of the fusion encoders.
        hidden_dim: width inside their feed-forward parts.
        context_dropout: dropout of the global temporal context.
        attention_dropout: dropout after the fusion encoders' attention.
        dropout: dropout in their feed-forward parts.

    Raises:
        UserError: an option out of its range, with what it may be.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int = 1,
        views: Sequence[str] = VIEWS,
        view_weights: Sequence[float] | None = None,
        pps: bool = True,
        selection: Selection = "argmax",
        train_selection: Selection = "sample",
        reliability: Sequence[str] = ("text",),
        direction: Direction = "global_to_local",
        single_direction: bool = False,
        detach_teacher: bool = False,
        top_k: int = 4,
        temperature: float = 200.0,
        smoothing: float = 0.5,
        num_heads: int = 8,
        hidden_dim: int = 2048,
        context_dropout: float = 0.1,
        attention_dropout: float = 0.2,
        dropout: float = 0.05,
    ) -> None:
        super().__init__(dim=dim, top_k=top_k, temperature=temperature)
        _check_choices("views", views, VIEWS)
        if not views:
            raise UserError("views is empty; give local, global or both")
        _check_choices("reliability", reliability, CONDITIONS)
        _check_choices("direction", [direction], DIRECTIONS)
        _check_choices("selection", [selection], SELECTIONS)
        _check_choices("train_selection", [train_selection], SELECTIONS)
        weights = [1.0] * len(views) if view_weights is None else list(view_weights)
        if len(weights) != len(views):
            raise UserError(f"view_weights has {len(weights)} numbers for {len(views)} views; give one a view")
        require(above=0, smoothing=smoothing, hidden_dim=hidden_dim)
        require(least=0, below=1, context_dropout=context_dropout, attention_dropout=attention_dropout, dropout=dropout)

        self.view_weights = dict(zip(views, weights, strict=True))
        self.pps = pps
        self.selection: Selection = selection
        self.train_selection: Selection = train_selection
        self.reliability = tuple(reliability)
        self.direction: Direction = direction
        self.single_direction = single_direction
        self.detach_teacher = detach_teacher
        self.smoothing = smoothing

        self.views = nn.ModuleDict()
        for view in views:
            context = GlobalTemporalContext(dim, context_dropout) if view == "global" else LocalTemporalContext(dim)
            encoder = FusionEncoder(dim, depth, num_heads, hidden_dim, attention_dropout, dropout)
            self.views[view] = View(context, encoder)

    @property
    def query_prompt(self) -> QueryPrompt:
        """The chosen class's prompt, the expectation over all, or each; without PPS none, and token 0 is zero."""
        selection = self.train_selection if self.training else self.selection
        kinds: dict[str, QueryPrompt] = {"expectation": "mixture", "each": "each"}
        return kinds.get(selection, "class") if self.pps else "none"

    @property
    def without_prompts(self) -> str:
        """Without PPS, and without reliability by text, token 0 of shots and queries alike may be zero."""
        if not self.pps and ("text" not in self.reliability or len(self.views) == 1):
            return ""
        return (
            "set model.head_options.pps to false and model.head_options.reliability to [visual] or [], or take the head"
            " otam"
        )

    def embed(self, videos: Tensor, prompt: Tensor | None) -> Embedded:
        """The fused sequence ``(…, 1 + frames, dim)`` of each view: token 0 is the text part, the others the visual."""
        prompt = torch.zeros_like(videos[..., 0, :]) if prompt is None else prompt
        return Embedded({name: view(videos, prompt) for name, view in self.views.items()})

    def prototype(self, embedded: Embedded, prompts: Tensor) -> Embedded:
        """The mean over the shots' fused sequences, in each view."""
        return embedded.map(lambda fused: fused.mean(-3))

    def match(self, query: Embedded, prototypes: Embedded, selected: SelectedPrompts) -> HeadOutput:
        """Compare fused sequences in each view, fuse the distances, and let the more reliable view teach the other."""
        views = {}
        for view in self.views:
            cosines = token_cosines(query[view], prototypes[view])
            views[view] = ViewOutput(self.distance(1 - cosines[..., 1:, 1:]), text_similarities=cosines[..., 0, 0])
        # d = Σ α_v d_v
        distances = torch.stack([self.view_weights[name] * view.distances for name, view in views.items()]).sum(0)
        distillation = None
        if len(views) == 2:
            distillation = mutual_distillation(
                views["local"],
                views["global"],
                conditions=self.reliability,
                direction=self.direction,
                detach_teacher=self.detach_teacher,
            )
        return HeadOutput.of(-distances, selected, views, distillation)

    def distance(self, costs: Tensor) -> Tensor:
        """The OTAM distance of ``costs (…, frames, frames)``: ``(…)``."""
        return otam(costs, smoothing=self.smoothing, single_direction=self.single_direction)

    def least_distance(self, frames: int, view: str = "") -> float:
        """OTAM's distance where no frame costs anything, with the weights of the views where they are fused."""
        least = float(self.distance(torch.zeros(frames, frames)))
        return least if view else least * sum(self.view_weights.values())

    def align(self, query: Embedded, prototypes: Embedded) -> dict[str, Tensor]:
        """How OTAM aligns queries with prototypes in each view, see :meth:`clip_m2df.nn.head.Head.align`."""
        return {
            view: otam_alignment(
                frame_costs(query[view][..., 1:, :], prototypes[view][..., 1:, :]),
                smoothing=self.smoothing,
                single_direction=self.single_direction,
            )
            for view in self.views
        }

    @classmethod
    def from_published(cls, state_dict: Mapping[str, Tensor], **options: Any) -> M2DFHead:
        """A head with the weights of a published checkpoint, in eval mode.

        Args:
            state_dict: the checkpoint's ``model_state_dict``, or the head's part of it. Keys of the tower
                (``backbone.*``) and the unused ``context_conv11`` and ``context_conv22`` are passed over, and so is
                ``module.`` before a key.
            **options: of the head, where they differ from the defaults; ``dim``, ``depth`` and ``hidden_dim`` are read
                off the shapes.

        Raises:
            UserError: keys that are not known or missing, named.
        """
        head = cls(**(published_head(state_dict)[1] | options))
        head.load_published(state_dict)
        return head.eval()

    def load_published(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take the weights of a published checkpoint; an ablation takes those of its own view only.

        Args:
            state_dict: see :meth:`from_published`.

        Raises:
            UserError: keys that are not known or missing, named.
        """
        renamed = published_head(state_dict)[0]
        for view in set(VIEWS) - set(self.views):
            renamed = {name: value for name, value in renamed.items() if not name.startswith(f"views.{view}.")}
        check_weights(self, renamed, "a published CLIP-M²DF checkpoint")
        self.load_state_dict(renamed)


class Towers(Protocol):
    """What :class:`M2DF` takes of a visual and a text tower: a module such as :class:`clip_m2df.CLIPBackbone`.

    Attributes:
        visual: the visual tower.
        text: the text tower, if there is one.
        dim: width of the features and of the prompt embeddings.
        image_size: height and width of the frames.
        dtype: what the towers' weights are held in, by torch's name.
        mean: what :meth:`normalise` subtracts.
        std: what it divides by.
        visual_config: what describes the visual tower, in plain types.
        source: where the weights came from.
        adapters: what describes the visual tower's adapters, if it has any; its own weights are frozen then.
    """

    visual: nn.Module
    text: nn.Module | None
    dim: int
    image_size: int
    dtype: str
    mean: Tensor
    std: Tensor
    visual_config: dict[str, Any]
    source: str
    adapters: dict[str, Any] | None

    def normalise(self, images: Tensor, /) -> Tensor:
        """Bring uint8 images ``(…, 3, height, width)`` to what the visual tower was trained on."""

    def encode_frames(self, images: Tensor, /) -> Tensor:
        """Embed normalised images: ``(…, dim)``, not L2-normalised."""

    def tokenize(self, texts: Sequence[str], /) -> Tensor:
        """Turn n texts into tokens ``(n, length)``."""

    def encode_text(self, tokens: Tensor, /) -> Tensor:
        """Embed tokens: ``(n, dim)``, not L2-normalised."""

    def load_openai(self, state: Mapping[str, Tensor], /) -> None:
        """Take weights by OpenAI's names in the place of one's own; those of the text tower may be absent."""

    def description(self) -> dict[str, Any]:
        """All but the weights, in plain types."""

    def eval(self) -> object:
        """Set evaluation mode."""


class M2DF(nn.Module):
    """CLIP-M²DF from frames to scores: CLIP's towers, the prompts, and a head.

    Args:
        backbone: CLIP's two towers. The text tower is frozen: its embeddings are computed once a class table and kept.
        head: :class:`M2DFHead`, or another.
        template: the prompt, with ``{}`` where the class goes; of several, :func:`clip_m2df.nn.prompts.ensemble`.
        freeze_backbone: train the head alone.

    Attributes:
        distinct_prompts: refuse classes that have one prompt; by default where the head's scores depend on prompts.
        without_prompts: what to change so that the scores need no prompts; "" where they don't.
    """

    def __init__(
        self,
        backbone: Towers,
        head: Head,
        template: str | Sequence[str] = DEFAULT_TEMPLATE,
        freeze_backbone: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.templates = check_templates(template)
        self.freeze_backbone = freeze_backbone
        self.distinct_prompts = head.uses_prompts
        self.without_prompts = head.without_prompts
        if backbone.adapters is None or freeze_backbone:
            backbone.visual.requires_grad_(not freeze_backbone)
        if backbone.text is not None:
            backbone.text.requires_grad_(False)
        self._prompt_tables: dict[tuple[str, ...], Tensor] = {}
        self._class_embeddings: dict[str, Tensor] = {}
        self.register_load_state_dict_post_hook(_forget_prompts)  # type: ignore[no-untyped-call]
        self.train()  # what is frozen is in eval mode from the start: a Trainer keeps the modes that it finds

    @classmethod
    def from_published(
        cls,
        file: str | os.PathLike[str],
        *,
        clip: Towers,
        template: str | Sequence[str] = DEFAULT_TEMPLATE,
        **options: Any,
    ) -> M2DF:
        """The model in a checkpoint of the published code, in eval mode.

        Frames go in as in its training, in [0, 1] without CLIP's mean and std, and queries' prompts are drawn at
        evaluation too.

        Args:
            file: the checkpoint. It has the head and the visual tower; their training may have been wrapped in
                DataParallel, and optimiser and schedule may be in it too.
            clip: the CLIP that its training began with, such as ``CLIPBackbone.load("ViT-B-16.pt")``; the model has its
                text tower and its tokenizer, which the file lacks. It is copied, and stays as it is.
            template: the prompt; the published one by default.
            **options: of the head, see :meth:`M2DFHead.from_published`; ``selection`` is ``sample`` by default.

        Raises:
            UserError: a file that can't be read safely, or of another model; a CLIP that does not fit it.
        """
        if not isinstance(clip, nn.Module):
            raise UserError(f"clip is of the type {type(clip).__name__}, no CLIP: give CLIPBackbone.load(…)")
        state = published_state(read_weights(Path(file).expanduser(), inside="model_state_dict")) or {}
        try:
            shapes = published_head(state)[1] | {"dim": clip.dim}
            head = M2DFHead(**(shapes | {"selection": "sample"} | options))
            model = cls(copy.deepcopy(clip), head, template)
            model.load_published(state)
        except UserError as error:
            raise UserError(f"{file}: {error}") from error
        return model.eval()

    def load_published(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights of a published checkpoint, and the scaling of frames in its training: none but to [0, 1].

        Args:
            state: see :func:`clip_m2df.nn.weights.published_state`.

        Raises:
            UserError: it is of another model, or there is no text tower for prompts.
        """
        assert isinstance(self.head, M2DFHead)
        if self.backbone.text is None:
            raise UserError(
                f"the prompts need a text tower, which {self.backbone.source} has not: give the CLIP that the training"
                " began with, both towers"
            )
        self.backbone.load_openai(published_tower(state))
        self.backbone.mean.zero_()
        self.backbone.std.fill_(1.0)
        self.head.load_published(state)
        self._prompt_tables.clear()

    def train(self, mode: bool = True) -> M2DF:
        """Set training mode; a frozen tower stays in eval mode, and so does the text tower always."""
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()
        elif self.backbone.text is not None:
            self.backbone.text.eval()
        return self

    def encode_frames(self, frames: Tensor) -> Tensor:
        """Features of uint8 ``frames (…, 3, height, width)``: ``(…, dim)``, not L2-normalised.

        They have the head's floating type, whatever the tower's weights are held in; under autocast, autocast's.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_backbone):
            features = self.backbone.encode_frames(self.backbone.normalise(frames))
            if not torch.is_autocast_enabled(device := features.device.type):
                return features.to(self.head.scale.dtype)
            half = torch.get_autocast_dtype(device)
            return features if features.dtype in (torch.float32, half) else features.to(half)

    def encode_episode(self, episode: Episode) -> tuple[Tensor, Tensor]:
        """Features of the support ``(…, n_shot, frames, dim)`` and the queries ``(…, frames, dim)`` of a batch."""
        support, query = episode["support"], episode["query"]
        if any(isinstance(module, _BatchNorm) and module.training for module in self.backbone.visual.modules()):
            # Batch norm that moves sees an episode at a time, whatever the batch: its support, and then its queries, as
            # in the published code.
            pairs = [(self.encode_frames(s), self.encode_frames(q)) for s, q in zip(support, query, strict=True)]
            return torch.stack([s for s, _ in pairs]), torch.stack([q for _, q in pairs])
        if "same" not in episode:
            return self.encode_frames(support), self.encode_frames(query)
        # A video that several episodes of the batch have in common goes through the tower once.
        clips = torch.cat((support.flatten(1, 2), query), 1).flatten(0, 1)
        chosen, inverse = episode["same"].flatten().unique(return_inverse=True)
        features = self.encode_frames(clips[chosen])[inverse].unflatten(0, episode["same"].shape)
        n_support = support.shape[1] * support.shape[2]
        return features[:, :n_support].unflatten(1, support.shape[1:3]), features[:, n_support:]

    @torch.no_grad()
    def encode_prompts(self, class_names: Sequence[str], labels: Sequence[str] | None = None) -> Tensor:
        """The prompt table ``(n_classes, dim)`` of these classes, float32, computed once and kept.

        Of a tower without text they are zero: heads that need no prompts take them for none.

        Args:
            class_names: what the prompts say.
            labels: what messages call the classes; the same by default.

        Raises:
            UserError: two classes have one prompt, see :meth:`check_prompts`; or the tower has no text, and the scores
                need prompts.
        """
        self.check_has_prompts()
        if not self.has_prompts:
            return torch.zeros(len(class_names), self.backbone.dim, device=self.device)
        names = tuple(class_names)
        device = self.device
        if self._class_embeddings.keys() >= {*names}:
            return torch.stack([self._class_embeddings[name] for name in names]).to(device)
        if names not in self._prompt_tables or self._prompt_tables[names].device != device:
            self.check_prompts(names, names if labels is None else labels)
            prompts = [self.backbone.tokenize(fill_template(t, names)).to(device) for t in self.templates]
            # Outside inference mode: what is made under it could not take part in training later.
            with torch.autocast(device.type, enabled=False), torch.inference_mode(False):
                embeddings = torch.stack([at_least_float32(self.backbone.encode_text(tokens)) for tokens in prompts])
                self._prompt_tables[names] = ensemble(embeddings)
        return self._prompt_tables[names]

    @property
    def has_prompts(self) -> bool:
        """Whether there is a text tower to make them, or class embeddings in its place."""
        return self.backbone.text is not None or bool(self._class_embeddings)

    def take_class_embeddings(self, embeddings: Mapping[str, Tensor]) -> None:
        """Have embeddings of classes that were computed elsewhere, in the place of their prompts'.

        Args:
            embeddings: float32 ``(dim)`` by what prompts would say.
        """
        self._class_embeddings = dict(embeddings)

    def check_has_prompts(self) -> None:
        """Refuse a tower without text where the scores need prompts.

        Raises:
            UserError: says what to change.
        """
        if self.without_prompts and not self.has_prompts:
            raise UserError(
                f"the weights of backbone {self.backbone.source!r} have no text tower, and so there are no prompts, by"
                f" which the model would score: {self.without_prompts}; or take weights that have both towers, or"
                " a feature table with class embeddings"
            )

    def check_prompts(self, class_names: Sequence[str], labels: Sequence[str]) -> None:
        """Refuse classes that have one prompt, where ``distinct_prompts`` says so.

        Args:
            class_names: what the prompts say.
            labels: what messages call the classes.

        Raises:
            UserError: names two such classes.
        """
        if self.distinct_prompts and self.backbone.text is not None and len(class_names) > 1:
            prompts = [self.backbone.tokenize(fill_template(t, class_names)) for t in self.templates]
            check_distinct(torch.stack(prompts), class_names, labels)

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.backbone.mean.device


def _forget_prompts(model: M2DF, incompatible_keys: object) -> None:
    """After loading: other weights, other prompts."""
    model._prompt_tables.clear()


def _check_choices(option: str, values: Sequence[str], choices: Sequence[str]) -> None:
    if isinstance(values, str):
        raise UserError(f"{option}: give a list, [{values}]")
    for value in values:
        if value not in choices:
            raise UserError(f"{option}: {value!r} is not one of {', '.join(choices)}")
    if len(set(values)) != len(values):
        raise UserError(f"{option}: {', '.join(values)} names one twice")
