"""Configs: those that come with the package, and those that a person names on the command line."""

import copy
import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from clip_m2df.errors import RENAMED_OPTIONS, UserError, say
from clip_m2df.files import read_text, shipped_files

# Of a config; a few lines of aliases of aliases stand for as many as one likes, all of which the parser would visit.
MOST_VALUES = 10_000
# Options of earlier versions, and what to write instead. Those of heads are left to the head: others may have any.
FORMER_OPTIONS = {name: today for name, today in RENAMED_OPTIONS.items() if not name.startswith("model.head_options.")}
FORMER_OPTIONS["profile"] = "trainer.profiler simple"
# Tables of options, and the options that stand beside them in a config.
SECTIONS = ("trainer", "model", "data", "checkpoint", "dashboard")
OTHERS = ("config", "seed_everything", "ckpt_path", "weights_only", "report", "output", "profile")
# What Lightning writes first into the config of a run.
RUN_HEADER = "# lightning.pytorch=="


def shipped_configs() -> dict[str, Path]:
    """The configs that come with the package, by name relative to their folder."""
    configs = shipped_files("**/*.yaml")
    # W&B reads sweeps, and the study its settings; they are no configs of a run.
    return {name: path for name, path in configs.items() if not name.startswith(("sweeps/", "study/"))}


def headline(config: Path) -> str:
    """The first comment of a config."""
    return config.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()


def print_configs() -> None:
    """List the configs that come with the package."""
    configs = shipped_configs()
    width = max(map(len, configs))
    for name, path in configs.items():
        say(f"{name:{width}}  {headline(path)}")


def find_config(name: str) -> Path:
    """The config file of this name: in the working directory first, else among the shipped ones.

    Raises:
        UserError: There is none.
    """
    if not name:
        raise UserError("--config: give a file, or a shipped config's name; clip-m2df configs lists these")
    if os.path.exists(name):
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
        name = flag.removeprefix("--")
        if flag in ("--config", "-c"):
            arg = f"--config={_check_config(find_config(value if equals else next(remaining, '')))}"
        elif flag.startswith("--") and name in FORMER_OPTIONS:
            raise UserError(_instead_of(name))
        elif flag.startswith("--") and name.rstrip("+") in SECTIONS:
            value = value if equals else next(remaining, "")
            if not _is_table(value):
                raise UserError(
                    f"{flag} {value!r}: not a table of options; give a file by --config, with {name.rstrip('+')}: over"
                    f" its options, or an option by itself, as in --{name.rstrip('+')}.NAME VALUE"
                )
            arg = f"{flag}={value}"
        resolved.append(arg)
    return resolved


def _is_table(text: str) -> bool:
    """Whether the parser takes a text for a table; it takes another for the name of a file, and reads that."""
    try:
        return not os.path.exists(text) and isinstance(_load(text), dict)
    except (ValueError, RecursionError, yaml.YAMLError):
        return False


def _check_config(path: Path) -> str:
    """What the parser is to read: the path; or the content, where a run of an earlier version wrote it.

    Messages show nothing of a file that is not a config: any file may be named in the place of one.

    Raises:
        UserError: Names the file, which the parser's own messages don't.
    """
    text = read_text(path, "config")
    try:
        content = _load(text)
    except yaml.constructor.ConstructorError as error:
        raise UserError(f"config {path} can't be read: {error.problem}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "it"
        raise UserError(f"config {path} can't be read: {line} is not YAML") from error
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"config {path} can't be read: {reason}") from error
    content = {} if content is None else content
    known = (*SECTIONS, *OTHERS, "fit", "validate", "test", "episodes")
    if not isinstance(content, dict) or (content and not any(_near(key, known) for key in content)):
        raise UserError(f"config {path} is not a table of options; start from one that clip-m2df configs lists")
    if content.get("config"):
        raise UserError(
            f"config {path} names other configs under config: give each by a --config of its own, the later over the"
            " earlier"
        )
    for section in SECTIONS:
        if not isinstance(content.get(section, {}), dict):
            raise UserError(
                f"config {path}: {section} is not a table of options; write them out under {section}:, or give another"
                " file by a --config of its own"
            )
    if text.startswith(RUN_HEADER):
        updated = _update(content)
        return str(path) if updated == content else yaml.safe_dump(updated)
    names = {*content, *(f"data.{name}" for name in content.get("data", {}))}
    if former := sorted(FORMER_OPTIONS.keys() & names):
        raise UserError(f"config {path}: {_instead_of(former[0])}")
    return str(path)


def _near(key: object, known: Sequence[str]) -> bool:
    """Whether a key is an option or a misspelt one, in dots or not, with its command before it or not."""
    parts = str(key).split(".")
    return any(difflib.get_close_matches(part, known, n=1) for part in parts[:2])


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


def _load(text: str) -> Any:
    """Read YAML, once its size has been seen: aliases, and merges of them, are written out only then.

    Raises:
        ValueError: It has too many values, or an option twice, of which the parser would take the last.
    """
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    if _count(node, {}) > MOST_VALUES:
        raise ValueError(f"with its aliases written out, it has more than {MOST_VALUES} values")
    return yaml.safe_load(text)


def _count(node: yaml.Node | None, known: dict[int, int]) -> int:
    """Count the values of a tree, what stands in several places in each of them."""
    if id(node) not in known:
        children = node.value if isinstance(node, yaml.SequenceNode) else ()
        if isinstance(node, yaml.MappingNode):
            children, lines = [value for _, value in node.value], dict[str, int]()
            for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise ValueError(f"{key.value} stands in it twice, in lines {lines[key.value]} and {line}")
                lines[key.value] = line
        known[id(node)] = 1 + sum(_count(child, known) for child in children)
    return known[id(node)]
