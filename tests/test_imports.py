"""Which part of the package may import which, and how long its files and functions may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import clip_m2df

ROOT = Path(clip_m2df.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
MOST_LINES, MOST_LINES_OF_FUNCTION = 400, 60

# Up to the model, and what each part may import besides itself.
MAY: dict[str, set[str]] = {
    "__init__": set(),  # what it gives is imported when it is first asked for
    "errors": set(),
    "archive": set(),
    "shipped": {"errors"},
    "files": {"errors"},
    "checkpoints": {"archive", "errors", "files"},
    "episode": set(),
    "data": {"episode", "errors", "files"},
    "nn": {"archive", "episode", "errors"},
    "evaluation": {"episode", "errors", "files", "nn"},
    "optimiser": {"errors", "nn"},
    "model_options": {"errors", "nn"},
    "hub": {"errors", "files", "nn"},
    "module": {"checkpoints", "episode", "errors", "evaluation", "hub", "model_options", "nn", "optimiser"},
}
# All else makes use of a model, and may import any of these and one another, but no command; of commands, each those
# that stand before it.
COMMANDS = ["lightning_cli", "demo", "cli", "__main__"]
# What annotations alone may name beyond that: the model is derived from HubModel.
TYPES = {("hub", "module")} | {
    ("__init__", part) for part in ("classifier", "data", "episode", "errors", "module", "nn")
}


def part_of(module: str) -> str:
    """The package or file, right under the top, of ``clip_m2df.….…``; nothing for others' modules."""
    names = module.split(".")
    return names[1] if names[0] == "clip_m2df" and len(names) > 1 else ""


def imported(tree: ast.AST, *, types: bool = False) -> Iterator[tuple[str, bool]]:
    """The parts of the package that a file imports, and whether for annotations alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for child in node.body:
                yield from imported(ast.Module([child], []), types=True)
            continue
        if isinstance(node, ast.Import):
            yield from ((part_of(alias.name), types) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            if node.module == "clip_m2df":  # a file of it, or a name that stands for one
                homes = {alias.name: clip_m2df._HOMES.get(alias.name, alias.name) for alias in node.names}
                yield from ((home.split(".")[0], types) for home in homes.values() if home != "__version__")
            else:
                yield part_of(str(node.module)), types
        yield from imported(node, types=types)


def may_import(part: str, other: str, *, types: bool) -> bool:
    if types and (part, other) in TYPES:
        return True
    if part in MAY:
        return other in MAY[part]
    commands = COMMANDS[: COMMANDS.index(part)] if part in COMMANDS else []
    return other not in COMMANDS or other in commands


def refused(part: str, source: str) -> list[str]:
    found = dict.fromkeys(imported(ast.parse(source)))
    return [other for other, types in found if other not in ("", part) and not may_import(part, other, types=types)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert refused(part, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("part", "source", "parts"),
    [
        ("nn", "from clip_m2df.video.reader import probe", ["data"]),
        ("data", "def f():\n    if x:\n        import clip_m2df.nn.head", ["nn"]),
        (
            "evaluation",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from clip_m2df import CLIPM2DF",
            ["module"],
        ),
        ("hub", "if TYPE_CHECKING:\n    from clip_m2df.training.module import CLIPM2DF", []),
        ("hub", "from clip_m2df.training.module import CLIPM2DF", ["module"]),
        ("module", "from clip_m2df import EpisodeDataModule, __version__", ["data"]),
        (
            "classifier",
            "from clip_m2df import dashboard\nfrom clip_m2df.commands.trainer import run",
            ["lightning_cli"],
        ),
        ("demo", "from clip_m2df.commands.trainer import run\nfrom clip_m2df.cli import main", ["cli"]),
        ("nn", "import torch\nfrom clip_m2df.nn.head import Head\nfrom clip_m2df.errors import UserError", []),
    ],
)
def test_a_wrong_way_would_be_found(part: str, source: str, parts: list[str]) -> None:
    assert refused(part, source) == parts


def test_what_is_named_here_exists() -> None:
    assert {*MAY, *COMMANDS} <= {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_or_function_is_too_long(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            # A constructor's signature is as long as it has options.
            first = node.body[0].lineno if node.name == "__init__" else node.lineno
            assert node.end_lineno is not None
            assert node.end_lineno - first < MOST_LINES_OF_FUNCTION, node.name
