"""Write docs/configuration.md, every option of ``clip-m2df fit``, from the signatures and docstrings."""

import inspect
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import docstring_parser
import yaml

from clip_m2df import CLIPM2DF, EpisodeDataModule
from clip_m2df.commands.configs import headline, shipped_configs
from clip_m2df.nn.baselines import HEADS, head_class
from clip_m2df.training.checkpoints import RunCheckpoint
from clip_m2df.training.dashboard import Dashboard

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"

HEAD = """\
<!-- Written by scripts/configuration_reference.py from the code; change it there. -->

# Configuration

A run is configured by YAML files, `--config FILE` as often as you like, the later over the earlier, and by options on
the command line, over all files. `--model.lr 1.0e-5` is in YAML

```yaml
model:
  lr: 1.0e-5
```

What is not given has its default. An option that does not exist is refused. `clip-m2df fit --print_config` prints the
whole configuration and ends; that of a run is kept as `config.yaml` in its folder. `validate` and `test` take the same
options, `test` also `report`, `also` and `bundle`, and `validate` also `calibrate`; what a checkpoint was trained with
can't be changed then.

## The command's own

| option | type | default | |
|---|---|---|---|
| `config` | `str` | `null` | a file, or the name of a [shipped config](#shipped-configs) |
| `print_config` | | | print the configuration and end |
| `seed_everything` | `int` or `bool` | `0` | of the first weights and of dropout; `true` draws one |
| `ckpt_path` | `str` | `null` | `best`, `last` or a file: `fit` goes on from it, `validate` and `test` measure it |
| `weights_only` | `bool` | `null` | Lightning's; whatever it says, no code in a checkpoint is run |
| `report` | `str` | `null` | of `test`: a page for a browser, .html ([reports](report.md)) |
| `also` | `str` | `null` | of `test`, on the command line, as often as you like: a further manifest that is\
 [tested too](training.md#on-other-data-sets) |
| `bundle` | `str` | `null` | of `test`: a file by which others [replay it](training.md#a-test-that-others-can-replay) |
| `calibrate` | `list[int]` | `null` | of `validate`: numbers of examples of a class, for which the checkpoint gets a\
 [calibration](guarantees.md#where-the-calibration-comes-from) in the place of its own |
| `trainer.*` | | | Lightning's Trainer, its `max_steps` in optimiser steps; `default_root_dir` is the run's folder |

`data.episodes_per_step` and `data.validate_every` set the Trainer's `accumulate_grad_batches` and `val_check_interval`.
"""

GROUPS: dict[str, tuple[str, type]] = {
    "model": ("The model", CLIPM2DF),
    "data": ("Episodes and videos", EpisodeDataModule),
    "checkpoint": ("Checkpoints", RunCheckpoint),
    "dashboard": ("Pictures and loggers", Dashboard),
}
# Parameters of a head that its options leave out: the first follows from the tower, the second is the model's own.
NOT_OF_A_HEAD = ("dim", "selection")
# Where a docstring leaves it to another class, or to the option before.
ELSEWHERE = re.compile(r"see :class:`[\w.]+`\.|the same\.")


def reference() -> str:
    """The page."""
    parts = [HEAD]
    for group, (title, cls) in GROUPS.items():
        parts.append(f"## {title}: `{group}`\n\n{_table(_options(cls), f'{group}.')}")
        if group == "model":
            parts.append("### Heads\n\n`model.head` takes the class path of another head, too.\n")
            parts.extend(_head(name) for name in HEADS)
    configs = shipped_configs()
    recipes = {name: path for name, path in configs.items() if name.startswith("recipes/")}
    complete = [f"| `{name}` | {headline(path)} |" for name, path in configs.items() if name not in recipes]
    parts.append("## Shipped configs\n\nA complete file a run; `clip-m2df configs` lists them.\n")
    parts.append("\n".join(["| | |", "|---|---|", *complete]) + "\n")
    parts.append("## Recipes\n\nLayered on a config with a second `--config`. What each of them sets:\n")
    parts.extend(f"`{name}`: {headline(path)}\n\n{_settings(path)}" for name, path in recipes.items())
    return "\n".join(parts)


def _head(name: str) -> str:
    """The section on a head's options."""
    cls = head_class(name)
    options = {option: p for option, p in _options(cls).items() if option not in NOT_OF_A_HEAD}
    summary = docstring_parser.parse(inspect.getdoc(cls) or "").short_description or ""
    return f"#### `{name}`: `model.head_options`\n\n{_markdown(summary)}\n\n{_table(options, '')}"


def _options(cls: type) -> dict[str, tuple[str, str, str]]:
    """Type, default and description of what a class takes, by name."""
    return {
        name: (_type(parameter.annotation), _default(parameter), _markdown(_description(cls, name)))
        for name, parameter in inspect.signature(cls, eval_str=True).parameters.items()
    }


def _description(cls: type, option: str) -> str:
    """What the docstring says of an option; of a class that leaves it to another, what the other says."""
    for base in cls.__mro__:
        for parameter in docstring_parser.parse(base.__doc__ or "").params:
            if parameter.arg_name == option and not ELSEWHERE.fullmatch(parameter.description or ""):
                return parameter.description or ""
    raise LookupError(f"no docstring of {cls.__name__} describes {option}")


def _type(hint: Any) -> str:
    """A type in words, without None, which the default tells."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_type(part) for part in get_args(hint) if part is not NoneType)
    if get_origin(hint) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(hint))
    if get_origin(hint) is Sequence:
        return f"`list[{get_args(hint)[0].__name__}]`"
    return f"`{hint.__name__}`" if not get_args(hint) else f"`{hint}`".replace("typing.", "")


def _default(parameter: inspect.Parameter) -> str:
    """A default as it stands in YAML; nothing where one has to be given."""
    value = parameter.default
    if value is parameter.empty:
        return "to be given"
    if isinstance(value, tuple):
        value = list(value)
    return f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("\n").removesuffix("\n...")


def _markdown(text: str) -> str:
    """A docstring's text on one line, its roles and literals as code."""
    text = re.sub(r":\w+:`([^`]+)`", r"`\1`", " ".join(text.split()))
    return text.replace("``", "`").replace("|", "\\|")


def _table(options: Mapping[str, tuple[str, str, str]], prefix: str) -> str:
    rows = [f"| `{prefix}{name}` | {kind} | {default} | {text} |" for name, (kind, default, text) in options.items()]
    return "\n".join(["| option | type | default | |", "|---|---|---|---|", *rows]) + "\n"


def _settings(recipe: Path) -> str:
    rows = [f"| `{n}` | `{_yaml(v)}` |" for n, v in _flat(yaml.safe_load(recipe.read_text(encoding="utf-8")))]
    return "\n".join(["| option | value |", "|---|---|", *rows]) + "\n"


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested options by their dotted names."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
