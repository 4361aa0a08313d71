"""The command ``clip-m2df``. Light to import: what needs torch is imported once a command needs it."""

import argparse
import difflib
import inspect
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin

from clip_m2df.__about__ import __version__
from clip_m2df.errors import Stopped, UserError, names_as_data, printable, say

# Each command's function in ``clip_m2df.commands``, and what the list of commands says about it.
COMMANDS = {
    "fit": ("trainer.run", "train on the episodes of a manifest, choosing the best checkpoint on its val split"),
    "validate": ("trainer.run", "measure a checkpoint on val"),
    "test": ("trainer.run", "measure a checkpoint on test: accuracy with its 95 %% interval"),
    "demo": ("demo.run_demo", "render the embedded benchmark, train on it, and print a table of accuracies"),
    "configs": ("configs.print_configs", "list the configs that come with the package"),
    "prepare": ("prepare.prepare", "write the manifest of a data set from its files on disk"),
    "check": ("check.check_videos", "open every video of a manifest and say which are broken"),
    "cache": ("cache.cache_frames", "keep the frames of a manifest's videos, decoded and resized"),
    "encode": ("encode.encode_manifest", "write the features of a manifest's videos as a table that stands for them"),
    "predict": ("predict.predict_videos", "label videos from a few examples of each class"),
    "verify": ("verify.verify_bundle", "replay a test from its bundle, and say whether each query comes out the same"),
    "episodes": ("trainer.run", "write the test episodes of a config, for --data.episodes_file and other tools"),
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
        args: The command and its options; the process's own arguments by default.

    Returns:
        The exit status: 0; 1 where ``prepare``, ``check``, ``encode`` or ``predict`` found a fault in the data, or
        ``verify`` other numbers; 2 after an error that a person can mend, printed in plain words; 128 and its number
        after a signal.
    """
    args = list(sys.argv[1:] if args is None else args)
    show_traceback = "--traceback" in args
    try:
        with names_as_data():
            return _run([arg for arg in args if arg != "--traceback"])
    except BrokenPipeError:
        raise
    except (UserError, OSError) as error:  # OSError: a folder that can't be written, a full disk
        if show_traceback:
            raise
        say(f"clip-m2df: error: {_without_traceback(str(error))}", error=True)
        return 2
    except Stopped as stopped:
        if not stopped.silent:
            say(f"clip-m2df: {stopped}", error=True)
        return stopped.status
    except KeyboardInterrupt:
        say("clip-m2df: interrupted", error=True)
        return 130


def entry_point() -> None:
    """What the console script calls."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names may have letters that the terminal's encoding lacks
    try:
        try:
            status = main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever reads the output, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141  # as a shell has it of SIGPIPE
    sys.exit(status)


class _Parser(argparse.ArgumentParser):
    """argparse's, whose errors repeat what was typed, and say which option or choice may have been meant."""

    def error(self, message: str) -> NoReturn:
        # "invalid choice: 'otm' (choose from 'otam', …)", "unrecognized arguments: --suport x"
        choices = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        typed = [choices[1]] if choices else re.findall(r"(?<!\S)--[\w.-]+", message.partition("unrecognized")[2])
        known = re.findall(r"[\w-]+", choices[2]) if choices else list(self._option_string_actions)
        near = [match for name in typed for match in difflib.get_close_matches(name, known, n=1)]
        super().error(printable(message + "".join(f"; did you mean {name}?" for name in near)))


def _run(args: Sequence[str]) -> int:
    if not args or args[0] not in COMMANDS:
        parser = _top_level_parser()
        parser.parse_args(args)  # ends the process, but where there are no arguments
        parser.print_help()
        return 0
    module, name = COMMANDS[args[0]][0].split(".")
    if module == "trainer":
        from clip_m2df.commands.configs import resolve_configs

        args = resolve_configs(args)  # before the import of Lightning, which takes seconds
    function = getattr(import_module(f"clip_m2df.commands.{module}"), name)
    if module == "trainer":
        function(args)
        return 0
    return function(**vars(command_parser(args[0], function).parse_args(args[1:]))) or 0


def _top_level_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="clip-m2df",
        description="Few-shot action recognition with CLIP-M²DF.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"clip-m2df {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(metavar="COMMAND")
    for name, (_, summary) in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    return parser


def command_parser(command: str, function: Callable[..., object]) -> argparse.ArgumentParser:
    """Make the parser of a command from the signature of its function and the ``Args:`` of its docstring.

    A keyword-only parameter is an option, required if it has no default; one before the ``*`` is typed without a name,
    and ``*args`` are for callers in Python. A bool is a flag, a ``Sequence`` takes one value or more, a ``Literal`` has
    choices.

    Args:
        command: The name of the command.
        function: What runs it; every parameter is described in its docstring.
    """
    import docstring_parser

    docstring = docstring_parser.parse(inspect.getdoc(function) or "")
    texts = {
        param.arg_name: (param.description or "").replace("``", "").replace("%", "%%") for param in docstring.params
    }
    parser = _Parser(prog=f"clip-m2df {command}", description=docstring.short_description)
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            continue
        settings = {"help": texts[name]} | _settings(parameter.annotation)
        if parameter.kind is parameter.KEYWORD_ONLY:
            name = f"--{name}"
            settings |= {"required": True} if parameter.default is parameter.empty else {"default": parameter.default}
            if settings.get("default"):
                settings["help"] += " (default: %(default)s)"
        parser.add_argument(name, **settings)
    return parser


def _settings(annotation: Any) -> dict[str, Any]:
    """How ``add_argument`` takes values of a type."""
    kind = get_args(annotation)[0] if NoneType in get_args(annotation) else annotation
    if kind is bool:
        return {"action": "store_true"}
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    if get_origin(kind) is Sequence:
        return {"type": get_args(kind)[0], "nargs": "+"}
    return {"type": kind}


def _without_traceback(message: str) -> str:
    """The message alone, also where a worker process wrapped it in its traceback."""
    return re.split(r"\n[\w.]+Error: ", message.rstrip())[-1] if "Original Traceback" in message else message.rstrip()
