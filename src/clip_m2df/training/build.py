"""The model that options describe: options of a person, those that a file has, and published checkpoints."""

import inspect
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clip_m2df.clip.backbone import CLIPBackbone
from clip_m2df.errors import RENAMED_OPTIONS, UserError
from clip_m2df.nn.baselines import HEADS, head_class, options_of
from clip_m2df.nn.m2df import M2DF, M2DFHead
from clip_m2df.weight_files import read_weights


def saved_options(
    source: str | os.PathLike[str], saved: Any, model: type, *, head: str | None = None
) -> dict[str, Any]:
    """The options of a model that a file has, by the names of today.

    Args:
        source: the file, for messages.
        saved: its options.
        model: the model's class.
        head: the head that a person asked for: no other code is imported because a file names it.

    Raises:
        UserError: they are not those of such a model, or name other people's code.
    """
    options = dict(saved) if isinstance(saved, dict) else {}
    name = options.get("head")
    if not isinstance(options.get("backbone"), dict) or not isinstance(name, str):
        raise UserError(
            f"{source} is damaged or of another model: it has no options with head and backbone; give one that"
            f" clip-m2df fit or {model.__name__} wrote"
        )
    if unknown := [option for option in options if option not in inspect.signature(model).parameters]:
        raise UserError(
            f"{source} has the option {unknown[0]!r}, which {model.__name__} has not; give one of this version"
        )
    # What is imported already has been trusted.
    if name not in HEADS and name != head and name.rpartition(".")[0] not in sys.modules:
        raise UserError(
            f"{source} takes the head {name!r}, code that is not this package's: if you trust it, name it yourself, by"
            f" --model.head {name} or head={name!r}"
        )
    if isinstance(options.get("head_options"), dict):
        known, prefix = options_of(head_class(name)), "model.head_options."
        former = {old.removeprefix(prefix): new.removeprefix(prefix) for old, new in RENAMED_OPTIONS.items()}
        options["head_options"] = {
            key if key in known else former.get(key, key): value for key, value in options["head_options"].items()
        }
    return options


def options_by_name(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a model by their full names, those of the head one by one; weights tell the backbone."""
    own = {name: value for name, value in options.items() if name not in ("backbone", "head_options")}
    known = inspect.signature(head_class(options["head"])).parameters
    head = {name: parameter.default for name, parameter in known.items()} | (options["head_options"] or {})
    head = {f"head_options.{name}": value for name, value in head.items() if name not in ("dim", "selection")}
    return {f"model.{name}": list(v) if isinstance(v, tuple) else v for name, v in (own | head).items()}


def load_published(file: str | os.PathLike[str], *, tokenizer: str | None = None, **options: Any) -> M2DF:
    """Load the model, tower and head, in a checkpoint file of the published code; it is in eval mode.

    Args:
        file: the checkpoint, with the weights under ``model_state_dict`` and the tower under ``backbone.*``.
        tokenizer: see :meth:`clip_m2df.CLIPBackbone.from_openai`.
        **options: of the head, see :meth:`clip_m2df.M2DFHead.from_published`.

    Raises:
        UserError: a file that can't be read safely, or of another model.
    """
    state = read_weights(Path(file), inside="model_state_dict")
    tower = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    if not tower:
        raise UserError(f"{file} holds no tower under backbone.*; M2DFHead.from_published reads a head alone")
    if not any(key.startswith("visual.") for key in tower):  # the published code saves the visual tower alone
        tower = {f"visual.{key}": value for key, value in tower.items()}
    # The published code builds its tower as OpenAI does, whatever the shapes.
    backbone = CLIPBackbone.from_openai(tower, tokenizer=tokenizer, head_width=64, activation="quick_gelu")
    return M2DF(backbone, M2DFHead.from_published(state, **options)).eval()
