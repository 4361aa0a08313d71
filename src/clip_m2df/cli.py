"""The command ``clip-m2df``. Light to import: what needs torch is imported once a command needs it."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from clip_m2df import __version__
from clip_m2df.errors import UserError
from clip_m2df.shipped import find_config, shipped_configs

TRAINER_COMMANDS = {
    "fit": "train on the episodes of a manifest, choosing the best checkpoint on its val split",
    "validate": "measure a checkpoint on val",
    "test": "measure a checkpoint on test: accuracy with its 95 %% interval",
}
EXAMPLES = """examples:
  clip-m2df fit --config demo_5way1shot.yaml
  clip-m2df test --config demo_5way1shot.yaml --ckpt_path best
  clip-m2df fit --help          every option of the model, the data and the trainer
"""


def main(args: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        args: what the shell would give; the process's own arguments by default.

    Returns:
        The exit status: 0, or 2 after an error that a person can mend, printed as a plain line.
    """
    args = list(sys.argv[1:] if args is None else args)
    show_traceback = "--traceback" in args
    args = [a for a in args if a != "--traceback"]
    try:
        return _run(args)
    except UserError as error:
        if show_traceback:
            raise
        print(f"clip-m2df: error: {_plain(error)}", file=sys.stderr)
        return 2
    except OSError as error:  # a folder that can't be written, a full disk
        if show_traceback:
            raise
        print(f"clip-m2df: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("clip-m2df: interrupted", file=sys.stderr)
        return 130


def entry_point() -> None:
    """What the console script calls."""
    sys.exit(main())


def _run(args: list[str]) -> int:
    parser = _parser()
    options, rest = parser.parse_known_args(args[:1])
    if options.command in TRAINER_COMMANDS:
        from clip_m2df.lightning_cli import run

        run([options.command, *_resolve_configs(args[1:])])
    elif options.command == "demo":
        from clip_m2df.demo import run_demo

        demo_options = parser.parse_args(args)
        run_demo(Path(demo_options.output), demo_options.episodes)
    elif options.command == "configs":
        parser.parse_args(args)
        for name, path in shipped_configs().items():
            print(f"{name:32} {_headline(path)}")
    else:
        parser.print_help()
        return 2 if rest or args else 0
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="clip-m2df",
        description="Few-shot action recognition with CLIP-M²DF.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"clip-m2df {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, text in TRAINER_COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    demo = commands.add_parser(
        "demo", help="render the embedded benchmark, train on it, and print a table of accuracies"
    )
    demo.add_argument("--output", default="runs/demo", help="folder of the run, replaced if it is there (%(default)s)")
    demo.add_argument("--episodes", type=int, default=2000, help="test episodes of each row (%(default)s)")
    commands.add_parser("configs", help="list the configs that come with the package")
    return parser


def _resolve_configs(args: Sequence[str]) -> list[str]:
    """``--config NAME`` with the file that NAME stands for."""
    resolved = list(args)
    for i, arg in enumerate(resolved):
        flag, equals, value = arg.partition("=")
        if flag in ("--config", "-c"):
            if equals:
                resolved[i] = f"{flag}={find_config(value)}"
            elif i + 1 < len(resolved):
                resolved[i + 1] = str(find_config(resolved[i + 1]))
    return resolved


def _headline(config: Path) -> str:
    """The first comment of a config."""
    with config.open(encoding="utf-8") as lines:
        return next(lines, "").removeprefix("#").strip()


def _plain(error: UserError) -> str:
    """The message alone, also where a worker process wrapped it in its traceback."""
    message = str(error).rstrip()
    return re.split(r"\n[\w.]+Error: ", message)[-1] if "Original Traceback" in message else message
