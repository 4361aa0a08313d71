"""Names of classes and files are data: no terminal, markup, page, figure or spreadsheet obeys what they hold."""

import ast
import csv
import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib.cbook import is_math_text

import clip_m2df
from clip_m2df.cli import main
from clip_m2df.datasets.manifest import Manifest
from clip_m2df.errors import console, names_as_data, printable
from clip_m2df.evaluation import figures
from clip_m2df.files import plain, write_table
from clip_m2df.report.page import templates
from tests import clips
from tests.conftest import options
from tests.report.conftest import read

# What a terminal, rich, a spreadsheet, a format string, TeX, a page or a shell would obey, and what only looks odd.
HOSTILE = (
    "x [b]",
    "[red]",
    "[link=http:x]y",
    "\x1b]0;title\x07",
    "\x9b31m\x7f",
    "a\u202eb",
    "\u2066c\u2069\u2069d",
    '=HYPERLINK("http:x")',
    "+1",
    "-dash",
    "@sum",
    "'quoted\"",
    "tab\there",
    "carriage\rreturn",
    "new\nline",
    "$x^2$",
    "$\\frac{$",
    "{}{0}%s%(x)s",
    "back\\slash",
    "<b>&lt;",
    "{{ 7 * 7 }}",
    "é" * 124,
    "👩\u200d🚀",
    " spaces ",
    "a,b;c#d",
    "~",
    os.fsdecode(b"\xff\xfe"),
)
# What a manifest can hold, and no folder: it may name them in its cells.
LABELS = (*(name for name in HOSTILE if plain(name) == name and not {*"\r\n"} & {*name}), "x [/b]", "[/]", "../up")


@pytest.fixture
def says(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs a command that ends with one of some statuses, and prints nothing that is to be obeyed; what it says."""

    def show(message: Any, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))

    monkeypatch.setattr(warnings, "showwarning", show)  # pytest keeps them otherwise

    def run(*arguments: object, statuses: Sequence[int] = (0,)) -> str:
        capfd.readouterr()
        try:
            status: object = main(list(map(str, arguments)))
        except SystemExit as ended:  # argparse's own
            status = ended.code
        said = "".join(capfd.readouterr())
        assert [c for c in said if not c.isprintable() and c not in "\n\u200c\u200d"] == [], said
        assert "Traceback" not in said
        assert status in statuses, said
        return said

    return run


@pytest.fixture(scope="session")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("clips")
    return [clips.render(folder / f"{n}.mp4", n_frames=8 + n, size=(48, 32)) for n in range(3)]


def make_tree(root: Path, classes: Sequence[str], files: Sequence[str], rendered: Sequence[Path]) -> Path:
    """A folder for each class, with a clip under each of the names."""
    for c, label in enumerate(classes):
        (root / label).mkdir(parents=True)
        for f, name in enumerate(files):
            shutil.copy(rendered[(c + f) % len(rendered)], root / label / name)
    return root


def read_table(table: Path) -> list[dict[str, str]]:
    with table.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def original(cell: str) -> str:
    """What a text cell of a table for people says: as docs/trust.md has it."""
    return cell.removeprefix("'")


def assert_neutral(table: Path) -> None:
    """Nothing in a table for people begins like a formula."""
    with table.open(encoding="utf-8", newline="") as file:
        assert [cell for row in csv.reader(file) for cell in row if cell.startswith(tuple("=+-@\t\r"))] == []


# Commands


def test_folders_and_files_of_any_name_are_prepared_and_labelled(
    tmp_path: Path,
    rendered: list[Path],
    tiny_clip_dir: Path,
    says: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tree = tmp_path / "tree"
    for split in ("train", "test"):
        make_tree(tree / split, [name + split for name in HOSTILE], ["a.mp4", "-\x1b[2J.mp4"], rendered)
    table = tree / "m.csv"
    report = tmp_path / "report.csv"
    said = says("prepare", "folder", "--root", tree, "--output", table, "--report", report, statuses=(1,))
    assert "that a manifest cannot hold: rename them" in said
    assert r"\x1b]0;title\x07train" in said
    assert "[red]train" in said
    held = [name for name in HOSTILE if plain(name) == name and not {*"\r\n"} & {*name}]
    rows = read_table(table)
    assert {Path(row["path"]).parent.name for row in rows} == {
        name + split for name in held for split in ("train", "test")
    }
    assert {row["label"] for row in rows} == {(name + split).strip() for name in held for split in ("train", "test")}

    # Classes may have more names here: their folders are not listed in a table.
    named = [name for name in HOSTILE if plain(name) == name]
    support = make_tree(tmp_path / "support", named, ["a.mp4"], rendered)
    videos = make_tree(tmp_path / "videos", [""], [f"{name}.mp4" for name in HOSTILE], rendered)
    (videos / "broken\x1b[31m\n=.mp4").write_bytes(b"")
    names = {plain(str(path)) for path in videos.iterdir()}
    own = ["predict", "--backbone", tiny_clip_dir, "--support", support, "--videos", *videos.iterdir(), "--workers", 0]
    output = tmp_path / "=1+1.csv"
    page = tmp_path / "page [red]\x1b.html"
    said = says(*own, "--output", output, "--report", page, statuses=(1,))
    assert r"broken\x1b[31m\n=.mp4" in said
    rows = read_table(output)
    assert {original(row["path"]) for row in rows} == names
    assert {original(row["label"]) for row in rows if not row["error"]} <= {*named}
    assert {column[2:] for column in rows[0] if column.startswith("p_")} == {*named}
    assert_neutral(output)
    written = page.read_text(encoding="utf-8")
    assert [c for c in written if not c.isprintable() and c not in "\n\u200c\u200d"] == []
    shown = {node.text for node in read(page).all("bdi")}
    assert {printable(plain(path.name), keep="\n") for path in videos.iterdir()} <= shown

    raw = tmp_path / "raw.jsonl"
    says(*own, "--output", raw, statuses=(1,))
    assert {json.loads(line)["path"] for line in raw.read_text(encoding="utf-8").splitlines()} == names
    says(*own, "--segments", "--output", output, "--report", page, statuses=(1,))
    assert {original(row["path"]) for row in read_table(output)} <= names
    # Relative names may begin like a formula, or like an option.
    monkeypatch.chdir(videos)
    says(*own[:5], "--videos", *HOSTILE[7:9], *own[-2:], "--output", output, statuses=(1,))
    assert {original(row["path"]) for row in read_table(output)} == {*HOSTILE[7:9]}
    assert_neutral(output)


@pytest.mark.slow
def test_every_command_takes_a_manifest_with_any_names(
    tmp_path: Path, rendered: list[Path], tiny_clip_dir: Path, says: Callable[..., str]
) -> None:
    folder = tmp_path / "=data [red]\x1b[31m"
    rows = []
    for s, split in enumerate(("train", "val", "test")):
        for c, label in enumerate(LABELS):
            (folder / split / str(c)).mkdir(parents=True)
            for v in range(3):
                name = f"{split}/{c}/{LABELS[(c + v) % len(LABELS)].replace('/', '')[:60]}{v}.mp4"
                shutil.copy(rendered[(s + c + v) % 3], folder / name)
                rows.append([name, f"{label}{split}".strip(), split])
    broken = [name for name, _, split in rows if split == "val"][::3]
    for name in broken:
        (folder / name).write_bytes(b"")
    manifest = folder / "m.csv"
    write_table(manifest, "manifest", [["path", "label", "split"], *rows])
    names = {row[0] for row in rows}

    checked, fixed = tmp_path / "check.csv", folder / "-fixed.csv"
    said = says("check", "--manifest", manifest, "--output", checked, "--fix", fixed, "--workers", 1, statuses=(1,))
    assert printable(broken[0]) in said
    assert {row["path"] for row in read_table(checked)} == names  # it is read back: it stays as it is
    says("check", "--manifest", manifest, "--output", checked, "--workers", 1, statuses=(1,))
    assert {video.label for video in Manifest.read(fixed).videos} == {row[1] for row in rows}
    said = says("cache", "--manifest", manifest, "--output", tmp_path / "cache", "--workers", 1)
    assert printable(broken[0]) in said

    run = tmp_path / "run [b]\x1b[31m"
    own = options(
        manifest,
        tiny_clip_dir,
        run,
        "--data.n_shot=1",
        "--data.n_query=1",
        "--data.max_unusable=0.5",
        f"--data.cache={tmp_path / 'cache'}",
    )
    assert "takes its place" in says("fit", *own, "--data.seed=1")
    says("validate", *own, "--ckpt_path=best")
    page = tmp_path / "test.html"
    said = says("test", *own, "--ckpt_path=best", f"--report={page}")
    assert "hardest classes" in said
    tests = {row[1] for row in rows if row[2] == "test"}
    for name in ("test_classes.csv", "test_confusion.csv", "val_classes.csv"):
        assert_neutral(run / name)
    assert {original(row["class"]) for row in read_table(run / "test_classes.csv")} == tests
    matrix = read_table(run / "test_confusion.csv")
    assert {original(row["class"]) for row in matrix} == tests == {original(column) for column in [*matrix[0]][1:]}
    assert {printable(name) for name in tests} <= {node.text for node in read(page).all("bdi")}
    says("episodes", *own, f"--output={run / 'e.jsonl'}")
    says("test", *own, "--ckpt_path=best", f"--data.episodes_file={run / 'e.jsonl'}")


def test_what_is_typed_is_repeated_without_being_obeyed(
    tmp_path: Path, says: Callable[..., str], manifest: Path, tiny_clip_dir: Path
) -> None:
    for name in LABELS:
        file = tmp_path / name.replace("/", "")
        commands: list[list[object]] = [
            [name],
            ["check", name],
            ["check", "--manifest", file, "--output", file],
            ["cache", "--manifest", file, "--output", file],
            ["prepare", name, "--root", file, "--output", file],
            ["prepare", "folder", "--root", file, "--output", file],
            ["predict", "--backbone", "tiny", "--support", file, "--videos", file, "--output", f"{file}.csv"],
            ["predict", "--ckpt_path", f"{file}.ckpt", "--support", file, "--videos", file, "--output", f"{file}.csv"],
            ["fit", "--config", file],
        ]
        for command in commands:
            says(*command, statuses=(2,))


@pytest.mark.slow
def test_options_of_a_run_are_repeated_without_being_obeyed(
    tmp_path: Path, says: Callable[..., str], manifest: Path, tiny_clip_dir: Path
) -> None:
    own = options(manifest, tiny_clip_dir, tmp_path)
    for name in LABELS[3:9]:
        config = tmp_path / f"{name.replace('/', '')}.yaml"
        config.write_text(json.dumps({"model": {name: 1}}), encoding="utf-8")
        for more in (
            [f"--{name}"],
            [f"--model.head={name}"],
            [f"--model.backbone={name}"],
            [f"--data.manifest={tmp_path / config.name}"],
            [f"--data.cache={tmp_path / config.name}"],
            [f"--trainer.logger={name}"],
            [f"--trainer.accelerator={name}"],
            [f"--ckpt_path={name}"],
            [f"--config={config}"],
        ):
            says("fit", *own, *more, statuses=(2,))


def test_letters_that_the_terminals_encoding_lacks_are_escaped(tmp_path: Path, rendered: list[Path]) -> None:
    make_tree(tmp_path / "tree" / "train", ["é 打"], ["a.mp4"], rendered)
    make_tree(tmp_path / "tree" / "test", ["☃"], ["a.mp4"], rendered)
    ended = subprocess.run(
        [sys.executable, "-m", "clip_m2df", "prepare", "folder", "--root=tree", "--output=tree/m.csv"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONIOENCODING": "ascii:strict"},
        capture_output=True,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (1, b"")
    assert rb"\xe9 \u6253" in ended.stdout
    assert rb"\u2603" in ended.stdout


# What prints


def test_everything_prints_by_way_of_one_file() -> None:
    source = Path(clip_m2df.__file__).parent
    for file in source.rglob("*.py"):
        calls = [node.func for node in ast.walk(ast.parse(file.read_bytes())) if isinstance(node, ast.Call)]
        direct = [call.lineno for call in calls if isinstance(call, ast.Name) and call.id in ("print", "Console")]
        assert direct == [] or file.name == "errors.py", f"{file}, lines {direct}: take errors.say and errors.console"


@pytest.mark.parametrize("name", HOSTILE)
def test_warnings_log_lines_tables_and_titles_show_a_name_as_it_is(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.table import Table

    def show(message: Any, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))

    monkeypatch.setattr(warnings, "showwarning", show)
    handler, logger = logging.StreamHandler(sys.stderr), logging.getLogger("somebody's")
    logger.addHandler(handler)
    before = warnings.showwarning, warnings.formatwarning, logging.getLogRecordFactory()
    with names_as_data():
        warnings.warn(f"no {name}", stacklevel=1)
        logger.warning("no %s", name)
    logger.removeHandler(handler)
    assert (warnings.showwarning, warnings.formatwarning, logging.getLogRecordFactory()) == before
    lines = capsys.readouterr().err
    shown = printable(name, keep="\n")
    assert lines == f"clip-m2df: warning: no {shown}\n" + printable(f"no {name}\n".expandtabs(), keep="\n")

    table = Table(name, title=name, caption=name)
    table.add_row(name)
    table.add_row("x")
    drawn = console()
    drawn.width = 400
    drawn.print(table, name)
    with drawn.status(name):
        pass
    said = capsys.readouterr().out
    assert [c for c in said if not c.isprintable() and c not in "\n\u200c\u200d"] == []
    assert said.count(printable(name).strip()) >= 4


def test_a_name_in_a_page_turns_nothing_around_it() -> None:
    template = templates().from_string('<p title="{{ x }}">{{ x|name }} and {{ x }}</p>')
    assert template.render(x="\u202ea<\x00\u05d0\u2069") == (
        '<p title="\\u202ea&lt;\\x00\u05d0\\u2069"><bdi>\\u202ea&lt;\\x00\u05d0\\u2069</bdi> and '
        "\\u202ea&lt;\\x00\u05d0\\u2069</p>"
    )


@pytest.mark.parametrize("name", LABELS)
def test_a_figure_draws_a_name_as_it_is(name: str) -> None:
    drawn = figures.confusion_matrix(torch.eye(2, dtype=torch.long), [name, f"{name}{name}"])
    figures.picture(drawn)
    for shown in (figures.shortened(name), figures.shortened(f"{name}{name}")):
        assert printable(shown) == shown
        assert not is_math_text(shown)


# Any names

# Whatever a file system can hold: bytes, most of them text.
BYTES = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=60).map(str.encode),
    st.binary(min_size=1, max_size=60).map(lambda data: data.replace(b"/", b"").replace(b"\0", b"") or b"_"),
    st.sampled_from([os.fsencode(name) for name in HOSTILE]),
    st.lists(
        st.sampled_from([*"=+-@[]/{}$%\\'\"<>&\x1b\x9b\u202e\u2066\u2069\u200b\ufeff\t "]), min_size=1, max_size=12
    ).map(lambda parts: "".join(parts).replace("/", "").encode() or b"_"),
)
NAMES = st.lists(BYTES.map(os.fsdecode), min_size=3, max_size=10, unique=True)


def _check_names(names: list[str], tower: Path, rendered: list[Path], says: Callable[..., str], *, train: bool) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        # A letter in front keeps "..", and hidden folders, out; a number behind makes spellings differ.
        classes = [f"{'_' if name.startswith('.') else ''}{name}{n}" for n, name in enumerate(names)]
        held = [name for name in classes if plain(name) == name and not {*"\r\n"} & {*name}]
        tree = folder / "tree"
        for split in ("train", "val", "test"):
            files = [f"{classes[0]}.mp4", *("b.mp4", "c.mp4")[: 2 * train]]
            make_tree(tree / split, [f"{label} {split}" for label in classes], files, rendered)
        table = tree / "m.csv"
        said = says("prepare", "folder", "--root", tree, "--output", table, statuses=(1, 2))
        if table.exists():
            prepared = Manifest.read(table).videos
            assert {v.label for v in prepared} <= {f"{n} {s}".strip() for n in held for s in ("train", "val", "test")}
            assert {Path(v.path).parent.name.strip() for v in prepared} == {v.label for v in prepared}
            if train and len(held) >= 3:
                _check_training(table, folder, tower, says)
        else:
            assert said.startswith("clip-m2df: error: ")
        named = [label for label in classes if plain(label) == label] or ["x"]
        support = make_tree(folder / "support", named, ["a.mp4", "b.mp4"], rendered)
        videos = make_tree(folder / "videos", ["deep"], [f"{label}.mp4" for label in classes], rendered)
        output, page = folder / "out.csv", folder / "page.html"
        own = ["--backbone", tower, "--support", support, "--videos", videos, "--workers", 0, "--output", output]
        says("predict", *own, "--report", page)
        rows = read_table(output)
        assert {original(row["path"]) for row in rows} == {plain(str(p)) for p in (videos / "deep").iterdir()}
        assert {column for column in rows[0] if column.startswith("p_")} == {f"p_{name}" for name in named}
        assert {original(row["label"]) for row in rows} <= {*named}
        assert_neutral(output)
        assert not [c for c in page.read_text(encoding="utf-8") if not c.isprintable() and c not in "\n\u200c\u200d"]
        assert {printable(name, keep="\n") for name in named if len(named) < 6} <= {
            node.text for node in read(page).all("bdi")
        }


def _check_training(table: Path, folder: Path, tower: Path, says: Callable[..., str]) -> None:
    checked, cached = folder / "check.csv", folder / "cache"
    says("check", "--manifest", table, "--output", checked, "--workers", 1)
    videos = Manifest.read(table).videos
    assert {row["path"] for row in read_table(checked)} == {str(Path(v.path).relative_to(table.parent)) for v in videos}
    says("cache", "--manifest", table, "--output", cached, "--workers", 1)
    run = folder / "run"
    own = options(table, tower, run, "--data.n_shot=1", "--data.n_query=1", f"--data.cache={cached}")
    says("fit", *own)
    page = folder / "test.html"
    says("test", *own, "--ckpt_path=best", f"--report={page}")
    tests = {video.label for video in videos if video.split == "test"}
    assert {original(row["class"]) for row in read_table(run / "test_classes.csv")} == tests
    assert {printable(name, keep="\n") for name in tests} <= {node.text for node in read(page).all("bdi")}


once_more = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@settings(once_more, max_examples=12)
@given(names=NAMES)
def test_folders_and_files_of_any_name_are_prepared_labelled_and_shown(
    names: list[str], tiny_clip_dir: Path, rendered: list[Path], says: Callable[..., str]
) -> None:
    _check_names(names, tiny_clip_dir, rendered, says, train=False)


@pytest.mark.slow
@settings(once_more, max_examples=150)
@given(names=NAMES)
def test_many_more_names(names: list[str], tiny_clip_dir: Path, rendered: list[Path], says: Callable[..., str]) -> None:
    _check_names(names, tiny_clip_dir, rendered, says, train=False)


@pytest.mark.slow
@settings(once_more, max_examples=6)
@given(names=NAMES)
def test_any_names_are_trained_on(
    names: list[str], tiny_clip_dir: Path, rendered: list[Path], says: Callable[..., str]
) -> None:
    _check_names(names, tiny_clip_dir, rendered, says, train=True)
