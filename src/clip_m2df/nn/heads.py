"""Heads by name: what classifies the queries of an episode, on frame features and prompt embeddings.

A head is a :class:`clip_m2df.nn.head.Head` or has its interface: keyword options with ``dim`` among them,
``head(support, query, prompts, draws)`` that returns a :class:`clip_m2df.nn.head.HeadOutput`, and ``class_logits``.
Its class says ``trained = False`` if it has nothing to train.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from clip_m2df.errors import UserError

if TYPE_CHECKING:
    from clip_m2df.nn.head import Head

HEADS = {
    "m2df": "clip_m2df.nn.m2df.M2DFHead",
    "nearest_prototype": "clip_m2df.nn.baselines.NearestPrototypeHead",
    "otam": "clip_m2df.nn.baselines.OTAMHead",
    "zero_shot": "clip_m2df.nn.baselines.ZeroShotHead",
    "bi_mhm": "clip_m2df.nn.baselines.BiMHMHead",
    "clip_fsar": "clip_m2df.nn.clip_fsar.CLIPFSARHead",
}


def head_class(name: str) -> type[nn.Module]:
    """The class of a head.

    Args:
        name: a key of ``HEADS``, or a class path ``package.module.Class``.

    Raises:
        UserError: there is no such head, or it is not a ``torch.nn.Module``.
    """
    path = HEADS.get(name, name)
    module, _, attribute = path.rpartition(".")
    if not module:
        raise UserError(
            f"head: {name!r} is neither one of {', '.join(HEADS)} nor a class path like package.module.Class"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"head: {name!r} can't be imported ({error}); check the class path") from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise UserError(f"head: {name!r} is not a class derived from torch.nn.Module")
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
    try:
        return cast("Head", cls(**options))  # or what has its interface
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"head_options: {cls.__name__} does not take {dict(options)}: {error}") from error


def options_of(cls: type[nn.Module]) -> tuple[str, ...]:
    """Names of the options of a head's class."""
    return tuple(inspect.signature(cls).parameters)
