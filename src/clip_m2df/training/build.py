"""The model that options describe: options of a person, and those that a file has."""

import inspect
import os
from collections.abc import Mapping
from typing import Any

from clip_m2df.errors import RENAMED_OPTIONS, UserError
from clip_m2df.nn.baselines import check_asked_for, head_class, options_of


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
    check_asked_for(name, head, source, "--model.head")
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
