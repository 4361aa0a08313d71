"""Configs: those that come with the package, and those that a person names on the command line."""

import copy
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from clip_m2df.errors import RENAMED_OPTIONS, UserError, say

# Of a config; a few lines of aliases of aliases stand for as many as one likes, all of which the parser would visit.
MOST_VALUES = 10_000
# Options of earlier versions, and what to write instead. Those of heads are left to the head: others may have any.
FORMER_OPTIONS = {name: today for name, today in RENAMED_OPTIONS.items() if not name.startswith("model.head_options.")}
FORMER_OPTIONS["profile"] = "trainer.profiler simple"
# What Lightning writes first into the config of a run.
RUN_HEADER = "# lightning.pytorch=="


def shipped_configs() -> dict[str, Path]:
    """The configs that come with the package, by name relative to their folder."""
    package = Path(__file__).parent.parent
    # Inside a wheel they lie in the package; beside an editable install's sources at the top of the repository.
    folder = package / "configs" if (package / "configs").is_dir() else package.parents[1] / "configs"
    configs = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*.yaml"))}
    # W&B reads sweeps, and the study its settings; they are no configs of a run.
    return {name: path for name, path in configs.items() if not name.startswith(("sweeps/", "study/"))}


def headline(config: Path) -> str:
    """The first comment of a config."""
    return config.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()


def print_configs() -> None:
    """List the configs that come with the package."""
    for name, path in shipped_configs().items():
        say(f"{name:32} {headline(path)}")


def find_config(name: str) -> Path:
    """The config file of this name: in the working directory first, else among the shipped ones.

    Raises:
        UserError: There is none.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = shipped_configs()
    if name in shipped:
        return shipped[name]
    near = difflib.get_close_matches(name, shipped, n=1)
    hint = f"did you mean {near[0]}?" if near else "clip-m2df configs lists the shipped ones"
    raise UserError(f"config {name}: no such file here, and none of that name comes with the package; {hint}")


def resolve_configs(args: Sequence[str]) -> list[str]:
    """Replace ``--config NAME`` by the file that the name stands for, once it has been read.

    Args:
        args: A command of the trainer with its options.

    Raises:
        UserError: There is no such config, it can't be read, or an option is one of an earlier version.
    """
    resolved, remaining = [], iter(args)
    for arg in remaining:
        flag, equals, value = arg.partition("=")
        if flag in ("--config", "-c"):
            arg = f"--config={_check_config(find_config(value if equals else next(remaining, '')))}"
        elif flag.startswith("--") and (name := flag.removeprefix("--")) in FORMER_OPTIONS:
            raise UserError(_instead_of(name))
        resolved.append(arg)
    return resolved


def _check_config(path: Path) -> str:
    """What the parser is to read: the path; or the content, where a run of an earlier version wrote it.

    Raises:
        UserError: Names the file, which the parser's own messages don't.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
        if _count(content, {}) > MOST_VALUES:
            raise ValueError(f"with its aliases written out, it has more than {MOST_VALUES} values")
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"config {path} can't be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict | None):
        raise UserError(f"config {path} is not a table of options; start from one that clip-m2df configs lists")
    content = content or {}
    for section in ("model", "data", "trainer", "checkpoint"):
        if not isinstance(content.get(section, {}), dict):
            raise UserError(f"config {path}: {section} is {content[section]!r} and no table of options")
    if text.startswith(RUN_HEADER):
        updated = _update(content)
        return str(path) if updated == content else yaml.safe_dump(updated)
    names = {*content, *(f"data.{name}" for name in content.get("data", {}))}
    if former := sorted(FORMER_OPTIONS.keys() & names):
        raise UserError(f"config {path}: {_instead_of(former[0])}")
    return str(path)


def _update(content: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a run, with today's names in the place of those of earlier versions."""
    config = copy.deepcopy(dict(content))
    config.pop("profile", None)
    of_others = "." in str(config.get("model", {}).get("head"))  # a head by its class path
    for name, today in RENAMED_OPTIONS.items():
        *sections, option = name.split(".")
        table: Any = config
        for section in sections:
            table = table.get(section) if isinstance(table, dict) else None
        if isinstance(table, dict) and option in table and not (of_others and "head_options" in sections):
            table[today.rpartition(".")[2]] = table.pop(option)
    return config


def _instead_of(name: str) -> str:
    return f"there is no option {name} any more: write --{FORMER_OPTIONS[name]} instead"


def _count(node: Any, known: dict[int, int]) -> int:
    """Count the values of a tree, what stands in several places in each of them."""
    if id(node) not in known:
        children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        known[id(node)] = 1 + sum(_count(child, known) for child in children)
    return known[id(node)]
