"""Prompts: templates, and the probability prompt selector, PPS (paper, section 3.2)."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_m2df.errors import UserError
from clip_m2df.nn.matching import cosine, full_precision

DEFAULT_TEMPLATE = "a photo of {}"

Selection = Literal["argmax", "sample", "expectation", "each"]
SELECTIONS: tuple[str, ...] = get_args(Selection)


class SelectedPrompts(NamedTuple):
    """What PPS gives the queries.

    Attributes:
        embeddings: ``(…, n_queries, dim)``, each query's probability prompt embedding; of the selection ``each``
            ``(…, n_queries, n_way, dim)``, those of all classes.
        indices: int64 ``(…, n_queries)``, of the chosen classes in the episode (``expectation`` and ``each``: the
            likeliest).
        probabilities: ``(…, n_queries, n_way)``, PPS's distribution π over the episode's classes.
    """

    embeddings: Tensor
    indices: Tensor
    probabilities: Tensor


def check_templates(templates: str | Sequence[str]) -> list[str]:
    """One template or several, as a list.

    Raises:
        UserError: there is none, or one has no ``{}``, so that every class would have the same prompt.
    """
    templates = [templates] if isinstance(templates, str) else list(templates)
    if not templates:
        raise UserError(f"template is empty; give one like {DEFAULT_TEMPLATE!r}, or a list of them")
    for template in templates:
        if template.startswith("["):
            raise UserError(f"the template {template!r} looks like a list: put each of its templates in quotes")
        if "{}" not in template:
            raise UserError(
                f"the template {template!r} has no {{}} where the class goes; give one like {DEFAULT_TEMPLATE!r}"
            )
    return templates


def fill_template(template: str, class_names: Sequence[str]) -> list[str]:
    """The prompts of the classes.

    Args:
        template: a text with ``{}`` where the class goes.
        class_names: what to put there.
    """
    return [template.replace("{}", name) for name in class_names]


def check_distinct(tokens: Tensor, texts: Sequence[str], labels: Sequence[str]) -> None:
    """Refuse two classes that the text tower can't tell apart.

    Args:
        tokens: ``(n_templates, n_classes, length)``, of their prompts.
        texts: what the prompts say of the classes.
        labels: what messages call the classes.

    Raises:
        UserError: names two classes.
    """
    first: dict[tuple[int, ...], int] = {}
    for c, row in enumerate(tokens.transpose(0, 1).flatten(1).tolist()):
        other = first.setdefault(tuple(row), c)
        if other == c:
            continue
        classes = f"the classes {labels[other]!r:.80} and {labels[c]!r:.80}"
        if " ".join(texts[other].lower().split()) == " ".join(texts[c].lower().split()):
            raise UserError(
                f"{classes} have one text, {texts[c]!r:.80}, so that no prompt tells them apart: give each its own in "
                "the column text of the manifest, or as its name"
            )
        raise UserError(
            f"{classes} have texts that are the same to the text tower, which reads {tokens.shape[-1]} tokens: give "
            "each a text that differs before, in the column text of the manifest, or as its name"
        )


@full_precision
def ensemble(embeddings: Tensor) -> Tensor:
    """The prompt embeddings of classes from those of several templates: the mean of the normalised ones.

    It is scaled to the mean of their norms, since the fusion encoders take prompts as the tower gives them; so that of
    one template is that template's.

    Args:
        embeddings: ``(n_templates, n_classes, dim)``.

    Returns:
        ``(n_classes, dim)``.
    """
    if len(embeddings) == 1:
        return embeddings[0]
    direction = F.normalize(F.normalize(embeddings, dim=-1).mean(0), dim=-1)
    norm: Tensor = embeddings.norm(dim=-1, keepdim=True).mean(0)
    return direction * norm


def closest_frames(frames: Tensor, prompts: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The frames most like a prompt.

    Args:
        frames: ``(…, frames, dim)``.
        prompts: ``(…, n, dim)``.
        top_k: how many frames; all of them where there are fewer.

    Returns:
        Their cosines and their indices, both ``(…, n, min(top_k, frames))``.
    """
    values, indices = cosine(prompts, frames).topk(min(top_k, frames.shape[-2]), dim=-1)
    return values, indices


def prompt_scores(query: Tensor, prompts: Tensor, top_k: int = 4) -> Tensor:
    """How well each class's prompt describes each query: the mean cosine over the ``top_k`` closest frames.

    Args:
        query: ``(…, n_queries, frames, dim)``.
        prompts: ``(…, n_way, dim)``.
        top_k: frames that count.

    Returns:
        ``(…, n_queries, n_way)``.
    """
    return closest_frames(query, prompts.unsqueeze(-3), top_k)[0].mean(-1)


@full_precision
def prompt_probabilities(scores: Tensor, temperature: float = 200.0) -> Tensor:
    """``softmax(temperature · scores)`` over the classes, ``(…, n_queries, n_way)``.

    In bfloat16 these are off by up to 0.17, which is why they never are.
    """
    return (temperature * scores).softmax(-1)


def draw_classes(probabilities: Tensor, draws: Tensor) -> Tensor:
    """Invert each distribution's cumulative sum at a uniform.

    Args:
        probabilities: ``(…, n_way)``.
        draws: ``(…)`` in [0, 1).

    Returns:
        int64 ``(…)``; a class of probability 0 is never drawn.
    """
    cumulative = probabilities.cumsum(-1)
    drawn = (cumulative <= draws.unsqueeze(-1) * cumulative[..., -1:]).sum(-1)
    # A draw next to 1 may round to the whole sum, and so pass every class.
    indices = torch.arange(probabilities.shape[-1], device=probabilities.device)
    return drawn.minimum((indices * (probabilities > 0)).amax(-1))


@full_precision
def select_prompts(
    probabilities: Tensor, prompts: Tensor, selection: Selection = "argmax", draws: Tensor | None = None
) -> SelectedPrompts:
    """Give each query a prompt embedding.

    Args:
        probabilities: ``(…, n_queries, n_way)``.
        prompts: ``(…, n_way, dim)``.
        selection: the likeliest class's (``argmax``), that of a drawn one (``sample``), the mean (``expectation``), or
            those of all classes (``each``).
        draws: ``(…, n_queries)`` uniforms in [0, 1) for ``sample``.

    Raises:
        UserError: ``sample`` without draws.
    """
    if selection == "sample":
        if draws is None:
            raise UserError(
                "selection 'sample' needs draws, uniforms (…, n_queries); clip_m2df.episode.episode_draws makes them"
            )
        indices = draw_classes(probabilities, draws)
    else:
        indices = probabilities.argmax(-1)
    if selection == "expectation":
        embeddings = probabilities.to(prompts.dtype) @ prompts
    elif selection == "each":
        embeddings = prompts.unsqueeze(-3).expand(*probabilities.shape, -1)
    else:
        embeddings = torch.take_along_dim(prompts, indices.unsqueeze(-1), dim=-2)
    return SelectedPrompts(embeddings, indices, probabilities)
