"""Weights from elsewhere: those of the published checkpoints by our names; what weights and scores have to be."""

import re
from collections.abc import Mapping

from torch import Tensor, nn

from clip_m2df.errors import UserError, some

# A weight that every published checkpoint has, whatever its shapes.
_PUBLISHED = "context2.layers.0.1.net.0.weight"

# Published weights that belong to the tower, are there twice, or are never used.
_PASSED_OVER = re.compile(r"backbone\.|context_conv(11|22)\.|tcn\.network\.\d+\.net\.")

# From published names to ours, one substitution after the other.
_RENAMED = (
    (r"^context_conv([12])\.", r"views.local.context.conv\1."),
    (r"^tcn\.network\.", "views.global.context.blocks."),
    (r"\.weight_g$", ".parametrizations.weight.original0"),
    (r"\.weight_v$", ".parametrizations.weight.original1"),
    # The published names are crosswise: context2 is the local view's encoder, context_local the global view's.
    (r"^context2\.", "views.local.encoder."),
    (r"^context_local\.", "views.global.encoder."),
    (r"(\.encoder\.layers\.\d+)\.0\.(?:fn\.)?", r"\1."),
    (r"(\.encoder\.layers\.\d+)\.1\.net\.", r"\1.feed_forward."),
)


def published_state(saved: object) -> dict[str, Tensor] | None:
    """The weights of a published CLIP-M²DF checkpoint, without what DataParallel puts before their names.

    The published code wraps the tower in DataParallel by default (``backbone.module.*``).

    Args:
        saved: what the file holds: the weights, or a table with them under ``model_state_dict``.

    Returns:
        The weights by the names of the published model; None where these are no such weights.
    """
    state = saved.get("model_state_dict", saved) if isinstance(saved, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        return None
    state = _without_wrappers(state)
    return state if _PUBLISHED in state and all(isinstance(w, Tensor) for w in state.values()) else None


def _without_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named = {re.sub(r"^(?:module\.)?(backbone\.)?(?:module\.)?", r"\1", key): value for key, value in state.items()}
    return named if len(named) == len(state) else dict(state)  # two models' weights stay apart, and are refused


def published_tower(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The towers' weights of a published checkpoint by OpenAI's names; it has the visual tower alone, as a rule.

    Args:
        state: see :func:`published_state`.

    Raises:
        UserError: there are none.
    """
    tower = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    if not tower:
        raise UserError("it holds no tower under backbone.*; M2DFHead.from_published reads a head alone")
    if not any(key.startswith("visual.") for key in tower):
        tower = {f"visual.{key}": value for key, value in tower.items()}
    return tower


def published_head(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The head's weights of a published checkpoint by our names, and ``dim``, ``depth`` and ``hidden_dim``.

    Args:
        state_dict: the checkpoint's ``model_state_dict``, or the head's part of it.

    Raises:
        UserError: there is no weight that tells the shapes.
    """
    renamed = {}
    for key, value in _without_wrappers(state_dict).items():
        if not _PASSED_OVER.match(key):
            for pattern, ours in _RENAMED:
                key = re.sub(pattern, ours, key)
            renamed[key] = value
    try:
        hidden_dim, dim = renamed["views.local.encoder.layers.0.feed_forward.0.weight"].shape
    except (KeyError, ValueError):
        raise UserError(f"not a published CLIP-M²DF checkpoint: no key {_PUBLISHED}") from None
    layers = [int(match[1]) for key in renamed if (match := re.search(r"\.encoder\.layers\.(\d+)\.", key))]
    return renamed, {"dim": dim, "depth": max(layers) + 1, "hidden_dim": hidden_dim}


def check_weights(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Refuse weights that are not exactly those of a module, or not finite.

    Args:
        module: where they are to go.
        state: the weights.
        what: what they should be, for the message.

    Raises:
        UserError: names the first few that are missing, unknown, of another shape or not finite.
    """
    expected = module.state_dict()
    if missing := [key for key in expected if key not in state]:
        raise UserError(f"not {what}: missing {some(missing)}")
    if unknown := [key for key in state if key not in expected]:
        raise UserError(f"not {what}: unknown {some(unknown)}")
    for key, value in state.items():
        if value.shape != expected[key].shape:
            raise UserError(f"not {what}: {key} is {tuple(value.shape)}, expected {tuple(expected[key].shape)}")
        if expected[key].is_floating_point() and not value.is_floating_point():
            raise UserError(f"not {what}: {key} is of the type {value.dtype}, which is no floating one")
    if broken := not_finite({key: value.to(expected[key].dtype) for key, value in state.items()}):
        raise UserError(
            f"the weights {some(broken, 1)} of {what} are not finite (NaN or infinite): the training that saved them"
            " had failed, or the file is damaged; give another"
        )


def not_finite(state: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that have a NaN or an infinity in them."""
    return [key for key, value in state.items() if not value.isfinite().all()]


def check_finite(scores: Tensor, what: str) -> None:
    """Refuse scores that are NaN or infinite, of which the first class would be the best.

    Args:
        scores: logits or probabilities of any shape.
        what: whose scores they are, for the message.

    Raises:
        UserError: they are not finite.
    """
    if not scores.isfinite().all():
        raise UserError(
            f"the scores of {what} are not finite (NaN or infinite): the model's weights are damaged, or too large for"
            " the precision; give another checkpoint, or precision 32-true"
        )
