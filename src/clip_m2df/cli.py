"""The command ``clip-m2df``. Light to import: what needs torch is imported once a command needs it."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from clip_m2df.__about__ import __version__
from clip_m2df.commands.configs import find_config, shipped_configs
from clip_m2df.errors import Stopped, UserError

UNTRAINED_HEADS = ("otam", "nearest_prototype", "bi_mhm", "zero_shot")
DATA_SETS = ("kinetics100", "ssv2", "ssv2_small", "hmdb51", "ucf101", "folder")
TRAINER_COMMANDS = {
    "fit": "train on the episodes of a manifest, choosing the best checkpoint on its val split",
    "validate": "measure a checkpoint on val",
    "test": "measure a checkpoint on test: accuracy with its 95 %% interval",
}
EXAMPLES = """examples:
  clip-m2df prepare hmdb51 --root HMDB51 --output manifests/hmdb51.csv
  clip-m2df fit --config demo_5way1shot.yaml
  clip-m2df test --config demo_5way1shot.yaml --ckpt_path best
  clip-m2df predict --ckpt_path best.ckpt --support examples --videos clips --output labels.csv
  clip-m2df fit --help          every option of the model, the data and the trainer
"""


def main(args: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        args: what the shell would give; the process's own arguments by default.

    Returns:
        The exit status: 0; 1 where ``prepare``, ``check`` or ``predict`` found something wanting; 2 after an error that
        a person can mend, printed as a plain line; 128 and its number after a signal.
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
    except Stopped as stopped:
        if not stopped.silent:
            print(f"clip-m2df: {stopped}", file=sys.stderr)
        return stopped.status
    except KeyboardInterrupt:
        print("clip-m2df: interrupted", file=sys.stderr)
        return 130


def entry_point() -> None:
    """What the console script calls."""
    sys.exit(main())


def _run(args: list[str]) -> int:
    if args and args[0] in TRAINER_COMMANDS:
        from clip_m2df.commands.trainer import run

        run([args[0], *_resolve_configs(args[1:])])
        return 0
    parser = _parser()
    parsed, rest = parser.parse_known_args(args)
    if rest and parsed.command != "episodes":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options = {name: value for name, value in vars(parsed).items() if name not in ("command", "traceback")}
    if parsed.command == "prepare":
        from clip_m2df.commands.prepare import prepare

        return prepare(**options)
    if parsed.command == "check":
        from clip_m2df.commands.check import check_videos

        return check_videos(**options)
    if parsed.command == "predict":
        from clip_m2df.commands.predict import predict_videos

        return predict_videos(**options)
    if parsed.command == "cache":
        from clip_m2df.commands.cache import cache_frames

        cache_frames(**options)
    elif parsed.command == "episodes":
        from clip_m2df.commands.trainer import write_episodes

        write_episodes(["test", *_resolve_configs(rest)], **options)
    elif parsed.command == "demo":
        from clip_m2df.commands.demo import run_demo

        run_demo(**options)
    elif parsed.command == "configs":
        for name, path in shipped_configs().items():
            print(f"{name:32} {_headline(path)}")
    else:
        parser.print_help()
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
    demo.add_argument(
        "--output",
        type=Path,
        default=Path("runs/demo"),
        help="folder of the run, replaced if it is there (%(default)s)",
    )
    demo.add_argument("--episodes", type=int, default=2000, help="test episodes of each row (%(default)s)")
    commands.add_parser("configs", help="list the configs that come with the package")
    _add_prepare(commands.add_parser("prepare", help="write the manifest of a data set from its files on disk"))
    _add_check(commands.add_parser("check", help="open every video of a manifest and say which are broken"))
    _add_cache(commands.add_parser("cache", help="keep the frames of a manifest's videos, decoded and resized"))
    _add_predict(commands.add_parser("predict", help="label videos from a few examples of each class"))
    episodes = commands.add_parser(
        "episodes",
        help="write the test episodes of a config, for --data.episodes_file and other tools",
        usage="%(prog)s --config NAME --output FILE [options of clip-m2df test]",
        allow_abbrev=False,
    )
    episodes.add_argument("--output", type=Path, required=True, help="a JSON line an episode")
    return parser


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "dataset", choices=DATA_SETS, help="folder: a tree split/class/video, or class/video with --lists"
    )
    parser.add_argument(
        "--root", type=Path, required=True, help="folder with the videos, or folders of frames, at any depth"
    )
    parser.add_argument(
        "--lists",
        type=Path,
        help="folder with the split lists, or a list (hmdb51 and ucf101: their splits are built in)",
    )
    parser.add_argument(
        "--annotations",
        type=Path,
        nargs="+",
        default=[],
        help="files with class names, such as something-something-v2-train.json",
    )
    parser.add_argument("--output", type=Path, required=True, help="the manifest, a CSV")
    parser.add_argument("--report", type=Path, help="a CSV that names every missing and every ambiguous video")


def _add_check(parser: argparse.ArgumentParser) -> None:
    _add_manifest(parser)
    parser.add_argument("--output", type=Path, help="the table, a CSV (beside the manifest, NAME.check.csv)")
    parser.add_argument("--fix", type=Path, help="write a manifest without the unusable videos")
    parser.add_argument("--frames", type=int, default=8, help="frames a video at evaluation (%(default)s)")
    _add_workers(parser)


def _add_cache(parser: argparse.ArgumentParser) -> None:
    _add_manifest(parser)
    parser.add_argument("--output", type=Path, required=True, help="folder of the cache, for --data.cache")
    parser.add_argument("--short_side", type=int, default=256, help="of the kept frames, in pixels (%(default)s)")
    parser.add_argument(
        "--frames",
        type=int,
        default=24,
        help="kept of each video; an odd multiple of T keeps evaluation's own (%(default)s)",
    )
    _add_workers(parser)


def _add_predict(parser: argparse.ArgumentParser) -> None:
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--ckpt_path",
        help="a trained model: a .ckpt file, a folder that save_pretrained wrote, or a name on the hub;"
        " or a folder that FewShotClassifier.save wrote, which has its classes",
    )
    model.add_argument(
        "--backbone", help="CLIP's own weights instead, nothing trained: a name on the hub, a folder, rn50 or tiny"
    )
    parser.add_argument(
        "--head", choices=UNTRAINED_HEADS, help="how a clip is compared with the examples, with --backbone (otam)"
    )
    parser.add_argument("--support", type=Path, help="a folder with a folder of examples for each class")
    parser.add_argument(
        "--videos",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files, folders with videos at any depth, folders of numbered images",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="the table, .csv or .jsonl; a run that was broken off goes on"
    )
    parser.add_argument("--report", type=Path, help="a page for a browser, .html: each video with its frames, and why")
    parser.add_argument("--reject", action="store_true", help='say "none of these" of what is too far from every class')
    parser.add_argument(
        "--segments", action="store_true", help="what happens when in long videos, which are read in this process"
    )
    for option, text in (
        ("window", "length of a window in seconds, about that of the examples (2)"),
        ("stride", "seconds from one window to the next (a quarter of the window)"),
        ("smoothing", "seconds over which scores are averaged (half the window)"),
        ("fps", "frames a second: folders of images need it, a file's own times give way to it"),
    ):
        parser.add_argument(f"--{option}", type=float, help=f"with --segments: {text}")
    _add_workers(parser, "processes that decode; 0: this one, which a broken file may take with it (%(default)s)")


def _add_manifest(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--manifest", type=Path, required=True, help="a CSV with the columns path, label and split")
    parser.add_argument("--root", type=Path, help="a folder outside the manifest's own in which its videos may lie too")


def _add_workers(parser: argparse.ArgumentParser, text: str = "processes that decode (%(default)s)") -> None:
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help=text)
    parser.add_argument(
        "--timeout", type=float, default=60.0, help="seconds after which a video is given up (%(default)s)"
    )


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
