"""The configs that come with the package."""

from __future__ import annotations

import difflib
from pathlib import Path

from clip_m2df.errors import UserError


def shipped_configs() -> dict[str, Path]:
    """The configs that come with the package, by name relative to their folder."""
    package = Path(__file__).parent.parent
    # Inside a wheel they lie in the package; beside an editable install's sources at the top of the repository.
    folder = package / "configs" if (package / "configs").is_dir() else package.parents[1] / "configs"
    configs = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*.yaml"))}
    # W&B reads sweeps, and the study its settings; they are no configs of a run.
    return {name: path for name, path in configs.items() if not name.startswith(("sweeps/", "study/"))}


def find_config(name: str) -> Path:
    """The config file of this name: in the working directory first, else among the shipped ones.

    Raises:
        UserError: there is none.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = shipped_configs()
    if name in shipped:
        return shipped[name]
    near = difflib.get_close_matches(name, shipped, n=1)
    hint = f"did you mean {near[0]}?" if near else "clip-m2df configs lists the shipped ones"
    raise UserError(f"config {name}: no such file here, and none of that name comes with the package; {hint}")
