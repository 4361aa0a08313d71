"""How long the import and the command's help take, each in a process of its own: against the imports that they put off.

The plain version imports Lightning and transformers, which a package of this kind would do at once.
"""

import subprocess
import sys
from collections.abc import Iterator

from benchmarks.timing import Case, compare

COMMANDS = {
    "import clip_m2df": ["-c", "import clip_m2df"],
    "clip-m2df --help": ["-m", "clip_m2df", "--help"],
    "clip-m2df fit --help": ["-m", "clip_m2df", "fit", "--help"],
}
PLAIN = ["-c", "import lightning; from transformers import CLIPModel"]


def cases(*, repeat: int = 3) -> Iterator[Case]:
    """A case a command."""
    for name, arguments in COMMANDS.items():
        yield compare(name, lambda a=arguments: run(a), lambda: run(PLAIN), repeat=repeat, calls=1)  # type: ignore[misc]


def run(arguments: list[str]) -> None:
    """Run Python to its end."""
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
