import csv
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from clip_m2df.errors import UserError, printable, some
from clip_m2df.files import (
    beside,
    check_output,
    fingerprint,
    for_spreadsheet,
    locked,
    locked_folder,
    near_by,
    read_bytes,
    whole_file,
    write_table,
    write_text,
)


def test_reading_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12")
    assert read_bytes(tmp_path / "a", "list") == b"12"
    os.mkfifo(tmp_path / "fifo")
    for name, message in (
        ("b", r"there is no list .*/b: check the name; relative names start at"),
        ("", r"the list .* is a folder: name the file itself"),
        ("fifo", r"the list .*/fifo is not a regular file: name the file itself"),
        ("a/b", r"cannot read the list .*/a/b: Not a directory"),
        ("a" * 300, r"cannot read the list .*: File name too long"),
    ):
        with pytest.raises(UserError, match=message):
            read_bytes(tmp_path / name, "list")


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with whole_file(path, "file") as draft:
        draft.write_text("first")
        assert not path.exists()
    assert path.read_text() == "first"

    def broken_off() -> None:
        with whole_file(path, "file") as draft:
            draft.write_text("sec")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()
    assert path.read_text() == "first"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_a_fingerprint_changes_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"12")
    os.utime(path, ns=(5, 5))
    assert fingerprint(str(path)) == (1, 2, 5)
    assert fingerprint(str(tmp_path)) == (1, 2, 5)
    (tmp_path / "b").write_bytes(b"3")
    os.utime(tmp_path / "b", ns=(9, 9))
    (tmp_path / ".hidden").touch()
    assert fingerprint(str(tmp_path)) == (2, 3, 9)
    with pytest.raises(FileNotFoundError):
        fingerprint(str(tmp_path / "c"))


def _hold(folder: str, held: "multiprocessing.synchronize.Event") -> None:
    with locked_folder(folder, "cache"):
        held.set()
        signal.pause()


def test_one_process_writes_into_a_folder_until_it_ends_or_is_killed(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    other = context.Process(target=_hold, args=(str(tmp_path / "cache"), held))
    other.start()
    assert held.wait(60)
    with pytest.raises(UserError, match=r"another process writes the cache .*/cache: wait for its end"):
        locked_folder(tmp_path / "cache", "cache").__enter__()
    other.kill()
    other.join()
    for _ in range(2):
        with locked_folder(tmp_path / "cache", "cache"), pytest.raises(UserError, match="another process"):
            locked_folder(tmp_path / "cache", "cache").__enter__()
        assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("link", ["symbolic", "dangling", "hard", "fifo", "folder"])
def test_what_is_written_never_follows_a_link(tmp_path: Path, link: str) -> None:
    precious, out = tmp_path / "precious", tmp_path / "out"
    precious.write_text("kept")
    drafts = [beside(out, ".part"), beside(out, f".{os.getpid()}.part"), out]
    for path in drafts:
        if link in ("symbolic", "dangling"):
            path.symlink_to(precious if link == "symbolic" else tmp_path / "nowhere")
        elif link == "hard":
            os.link(precious, path)
        elif link == "fifo":
            os.mkfifo(path)
    if link == "folder":
        drafts[0].mkdir()
    with pytest.raises(UserError, match=r"out\.part is a link or not a regular file"):
        locked(drafts[0], "table", out).__enter__()
    if link == "fifo":
        with pytest.raises(UserError, match=r"the table .*/out is not a regular file"):
            write_text(out, "table", "new")
        assert out.is_fifo()
    else:
        write_text(out, "table", "new")
        assert out.read_text() == "new"
    assert precious.read_text() == "kept"
    assert not (tmp_path / "nowhere").exists()


def test_a_name_of_any_length_that_a_file_can_have_is_written(tmp_path: Path) -> None:
    for name in ("a" * 255, "a" * 254 + "b", "é" * 127):
        with locked(beside(tmp_path / name, ".part"), "table", tmp_path / name) as part:
            part.write("x")
        check_output(tmp_path / name, "table")
        write_text(tmp_path / name, "table", name)
    assert all((tmp_path / name).read_text() == name for name in ("a" * 255, "a" * 254 + "b"))
    assert len(list(tmp_path.iterdir())) == 6  # each has a part of its own
    with pytest.raises(UserError, match=r"cannot write the table .*: File name too long; give a shorter name"):
        check_output(tmp_path / ("a" * 256), "table")


def test_a_name_with_a_nul_is_no_name(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="no name may hold a NUL; give another name"),
        locked(tmp_path / "a\0b" / ".lock", "run folder", tmp_path / "a\0b"),
    ):
        pytest.fail("it was made")


@pytest.mark.parametrize("kind", ["fifo", "link to a device", "link to a fifo"])
def test_what_is_no_file_is_not_replaced_by_one(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "out"
    if "device" in kind:  # never by its own name: where this fails, the machine would have it no more
        path.symlink_to(os.devnull)
    elif "link" in kind:
        special = tmp_path / "special"
        os.mkfifo(special)
        path.symlink_to(special)
    else:
        os.mkfifo(path)
    with pytest.raises(UserError, match=r"the table .* is not a regular file: name the file itself"):
        check_output(path, "table")
    with pytest.raises(UserError, match=r"the table .* is not a regular file: name the file itself"):
        write_text(path, "table", "x")
    assert path.is_symlink() == ("link" in kind)
    assert path.is_fifo() or path.is_char_device()


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    write_text(path, "config", "good")
    with pytest.raises(UserError, match=r"cannot write the config .*/config.yaml: No space left on device; make room"):  # noqa: SIM117
        with whole_file(path, "config"):
            Path("/dev/full").write_text("cut")
    assert path.read_text() == "good"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_name_is_shown_without_what_a_terminal_obeys() -> None:
    assert printable("Straße 跳 – ok") == "Straße 跳 – ok"
    assert printable("\x1b]0;t\x07a\u202eb\u2066\r\n\udc80\x9b") == r"\x1b]0;t\x07a\u202eb\u2066\r\n\udc80\x9b"
    assert printable("a\nb", keep="\n") == "a\nb"
    assert printable("می\u200cدود") == "می\u200cدود"
    assert some(["\x1b[31m", "b"]) == r"\x1b[31m, b"


def test_a_cell_is_no_formula_and_can_be_read_back(tmp_path: Path) -> None:
    texts = ["=1+1", "+a", "-b", "@c", "\t=d", " =e", "\r", "\n", "'f", "''", "＝g", "plain", "", "a=b", "1"]
    texts += [f"{hidden}{sign}h" for hidden in "\u200b\ufeff\u202e\u00a0\x1b" for sign in "=+-@＝"]
    write_table(tmp_path / "t.csv", "table", [[for_spreadsheet(text)] for text in texts])
    with open(tmp_path / "t.csv", encoding="utf-8", newline="") as file:
        cells = [row[0] if row else "" for row in csv.reader(file)]
    assert all(not cell.lstrip("\u200b\ufeff\u202e\u00a0\x1b\t ").startswith(tuple("=+-@＝")) for cell in cells)
    assert [cell.removeprefix("'") for cell in cells] == texts


def test_a_name_much_like_one_that_is_there_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "best.ckpt").touch()
    (tmp_path / "jars_classifier").mkdir()
    monkeypatch.chdir(tmp_path)
    assert near_by("best.ckp") == "; did you mean best.ckpt?"
    assert near_by("jars_classifer/") == "; did you mean jars_classifier?"
    assert near_by(str(tmp_path / "bset.ckpt")) == f"; did you mean {tmp_path / 'best.ckpt'}?"
    for other in ("best.ckpt", "", "openai/clip-vit-base-patch16", "nothing", "\0", "best.ckpt/x"):
        assert near_by(other) == ""
