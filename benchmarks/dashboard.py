"""The dashboard's share of a training: the seconds spent in its hooks, of those of the demo's whole ``fit``.

Once with W&B, offline, once with a folder of pictures. ``ours`` is the time in the hooks, ``plain`` all the rest of
``Trainer.fit``; ``share`` is ours of both, and ``bar`` the most that it may be.
"""

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

from benchmarks.timing import Case, report

BAR = 0.02
CONFIGS = {"folder": [], "W&B, offline": ["--config=recipes/wandb_offline.yaml"]}


def cases(*, options: Sequence[str] = ()) -> Iterator[Case]:
    """A case a logger.

    Args:
        options: of ``clip-m2df fit``, beside the demo's config.
    """
    for name, configs in CONFIGS.items():
        in_hooks, whole, calls = measure([*configs, *options])
        share = in_hooks / whole
        yield report(name, in_hooks, whole - in_hooks, share=share, bar_share=BAR, hooks=calls, within_bar=share < BAR)


def measure(options: Sequence[str]) -> tuple[float, float, int]:
    """Run ``fit`` in a folder of its own.

    Returns:
        Seconds in the dashboard's hooks, seconds of ``Trainer.fit``, and how often a hook was called.
    """
    import lightning

    from clip_m2df.cli import main
    from clip_m2df.training.dashboard import Dashboard

    seconds, calls = {"fit": 0.0, "hooks": 0.0}, 0
    kept = {
        name: value for name, value in vars(Dashboard).items() if name in dir(lightning.Callback) and name[0] != "_"
    }
    fit = lightning.Trainer.fit

    def timed(function: Any, what: str) -> Any:
        @wraps(function)  # its signature tells the command line its options
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += what == "hooks"
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[what] += time.perf_counter() - started

        return call

    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        try:
            setattr(lightning.Trainer, "fit", timed(fit, "fit"))  # noqa: B010
            for name, hook in kept.items():
                setattr(Dashboard, name, timed(hook, "hooks"))
            os.chdir(folder)  # W&B's files lie beside the run's
            run = ["--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={Path(folder) / 'run'}"]
            status = main(["fit", "--config=demo_5way1shot.yaml", *options, *run])
        finally:
            os.chdir(here)
            setattr(lightning.Trainer, "fit", fit)  # noqa: B010
            for name, hook in kept.items():
                setattr(Dashboard, name, hook)
    if status:
        raise RuntimeError(f"fit ended with status {status}")
    return seconds["hooks"], seconds["fit"], calls
