"""Which part of the package may import which: at the top of a file, in a function, and for annotations alike."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import clip_m2df

ROOT = Path(clip_m2df.__file__).parent
# A part is a folder or a file right under the package. Each may import itself, and these.
ANY = {"errors", "files", "weight_files", "episode", "__about__"}
MODEL = ANY | {"nn", "evaluation", "clip", "hub", "loops"}
DATA = ANY | {"video", "datasets", "motion_shapes", "loops"}
TRAINING = MODEL | DATA | {"episodes", "training"}
COMMANDS = TRAINING | {"classifier", "report", "export", "commands"}
MAY_IMPORT: dict[str, set[str]] = {
    "__about__": set(),
    "errors": set(),
    "files": {"errors"},
    "weight_files": {"errors", "files"},
    "episode": {"errors"},
    # The method.
    "nn": ANY,
    "evaluation": ANY | {"nn"},
    # The towers, beside the method; what builds both from names and files.
    "clip": {"errors", "files", "weight_files"},
    "hub": ANY | {"nn", "clip"},
    # Videos and episodes.
    "motion_shapes": {"errors", "files"},
    "video": ANY,
    "datasets": ANY | {"video"},
    "loops": {"errors"},
    "episodes": DATA,
    # What makes use of all that.
    "training": MODEL | DATA | {"episodes"},
    "export": TRAINING,
    "classifier": TRAINING,
    "report": TRAINING | {"classifier"},
    "commands": COMMANDS,
    "cli": COMMANDS,
    "__main__": {"cli"},
    # The public names; imported by nobody.
    "__init__": COMMANDS,
}


def module_of(path: Path) -> str:
    """The name of a file's module, ``clip_m2df.…``; that of a folder for its ``__init__.py``."""
    names = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


MODULES = {module_of(path): path.read_text(encoding="utf-8") for path in sorted(ROOT.rglob("*.py"))}


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def imports_of(source: str) -> Iterator[str]:
    """The modules of the package that a file imports, wherever it does."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "an import relative to a folder"
            # A module in a folder, or a name in a module.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else str(node.module) for name in names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "clip_m2df")


def wrong_imports(module: str, source: str) -> set[str]:
    part = part_of(module)
    return {name for name in imports_of(source) if part_of(name) not in MAY_IMPORT[part] | ({part} - {"__init__"})}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str) -> None:
    assert wrong_imports(module, MODULES[module]) == set()


def test_no_files_import_each_other_in_a_circle() -> None:
    # A circle is an error that names its files.
    TopologicalSorter({module: {*imports_of(source)} - {module} for module, source in MODULES.items()}).prepare()


def test_the_order_of_the_parts_is_one() -> None:
    TopologicalSorter({part: others - {part} for part, others in MAY_IMPORT.items()}).prepare()
    assert set(MAY_IMPORT) == {part_of(module) for module in MODULES}


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("nn.m2df", "from clip_m2df.video.reader import probe", {"clip_m2df.video.reader"}),
        ("nn.m2df", "from clip_m2df.clip import backbone", {"clip_m2df.clip.backbone"}),
        ("datasets.tree", "def f():\n    if x:\n        import clip_m2df.nn.head", {"clip_m2df.nn.head"}),
        ("hub", "if TYPE_CHECKING:\n    from clip_m2df.training.module import CLIPM2DF", {"clip_m2df.training.module"}),
        ("export", "from clip_m2df import CLIPM2DF, __version__", {"clip_m2df"}),
        ("commands.demo", "import clip_m2df\nfrom clip_m2df.cli import main", {"clip_m2df", "clip_m2df.cli"}),
        ("training.module", "from clip_m2df import loops\nfrom clip_m2df.training.build import saved_options", set()),
        ("nn.m2df", "import torch\nfrom clip_m2df.nn.head import Head\nfrom clip_m2df.errors import UserError", set()),
    ],
)
def test_a_wrong_way_would_be_found(module: str, source: str, wrong: set[str]) -> None:
    assert wrong_imports(f"clip_m2df.{module}", source) == wrong
