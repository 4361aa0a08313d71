"""The published checkpoints: their names of the head's weights, and the options that their shapes tell."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from clip_m2df.errors import UserError, some

# Published names that hold no weights of their own or none that are used.
_PASSED_OVER = re.compile(r"backbone\.|context_conv(11|22)\.|tcn\.network\.\d+\.net\.")


# Published names and ours, in the order in which they are tried.
_RENAMED = (
    (r"scale", "scale"),
    (r"context_conv([12])\.(weight|bias)", r"views.local.context.conv\1.\2"),
    (r"tcn\.network\.(\d)\.conv([12])\.bias", r"views.global.context.blocks.\1.conv\2.bias"),
    (
        r"tcn\.network\.(\d)\.conv([12])\.weight_g",
        r"views.global.context.blocks.\1.conv\2.parametrizations.weight.original0",
    ),
    (
        r"tcn\.network\.(\d)\.conv([12])\.weight_v",
        r"views.global.context.blocks.\1.conv\2.parametrizations.weight.original1",
    ),
    # The published names have it crosswise: context2 is the local view's encoder, context_local the global view's.
    (r"context2\.layers\.(\d+)\.(.+)", r"views.local.encoder.layers.\1.\2"),
    (r"context_local\.layers\.(\d+)\.(.+)", r"views.global.encoder.layers.\1.\2"),
)


_RENAMED_IN_LAYER = (
    (r"\.0\.norm\.(weight|bias)$", r".norm.\1"),
    (r"\.0\.fn\.(to_[qkv]\.weight|to_out\.0\.(?:weight|bias))$", r".\1"),
    (r"\.1\.net\.([03])\.(weight|bias)$", r".feed_forward.\1.\2"),
)


def published_head(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The head's weights of a published checkpoint by our names, and ``dim``, ``depth`` and ``hidden_dim``.

    Args:
        state_dict: the checkpoint's ``model_state_dict``, or the head's part of it.

    Raises:
        UserError: keys that are not known, named, or none that tells the shapes.
    """
    renamed, unknown = {}, []
    for key, value in state_dict.items():
        name = _own_name(key)
        if name is None:
            unknown.append(key)
        elif name:
            renamed[name] = value
    if unknown:
        raise UserError(f"not a published CLIP-M²DF checkpoint: unknown keys {some(unknown)}")
    try:
        hidden_dim, dim = renamed["views.local.encoder.layers.0.feed_forward.0.weight"].shape
    except KeyError:
        raise UserError("not a published CLIP-M²DF checkpoint: no key context2.layers.0.1.net.0.weight") from None
    depths = {int(match[1]) for key in renamed if (match := re.search(r"encoder\.layers\.(\d+)\.", key))}
    return renamed, {"dim": dim, "depth": max(depths) + 1, "hidden_dim": hidden_dim}


def _own_name(key: str) -> str | None:
    """Our name of a published key; empty for one that is passed over, None for one that is not known."""
    if _PASSED_OVER.match(key):
        return ""
    for pattern, ours in _RENAMED:
        if match := re.fullmatch(pattern, key):
            name = match.expand(ours)
            if ".encoder." not in name:
                return name
            for layer_pattern, layer_ours in _RENAMED_IN_LAYER:
                renamed, count = re.subn(layer_pattern, layer_ours, name)
                if count:
                    return renamed
    return None


def check_weights(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Refuse weights that are not exactly those of a module.

    Args:
        module: where they are to go.
        state: the weights.
        what: what they should be, for the message.

    Raises:
        UserError: names the first few that are missing, unknown or of another shape.
    """
    expected = module.state_dict()
    if missing := [key for key in expected if key not in state]:
        raise UserError(f"not {what}: missing {some(missing)}")
    if unknown := [key for key in state if key not in expected]:
        raise UserError(f"not {what}: unknown {some(unknown)}")
    for key, value in state.items():
        if value.shape != expected[key].shape:
            raise UserError(f"not {what}: {key} is {tuple(value.shape)}, expected {tuple(expected[key].shape)}")
