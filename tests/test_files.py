import os
from pathlib import Path

import pytest

from clip_m2df.errors import UserError
from clip_m2df.files import fingerprint, read_bytes, whole_file


def test_reading_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12")
    assert read_bytes(tmp_path / "a", "list") == b"12"
    os.mkfifo(tmp_path / "fifo")
    for name, message in (
        ("b", r"there is no list .*/b: check the name; relative names start at"),
        ("", r"the list .* is a folder: name the file itself"),
        ("fifo", r"the list .*/fifo is no regular file: name the file itself"),
        ("a/b", r"cannot read the list .*/a/b: Not a directory"),
        ("a" * 300, r"cannot read the list .*: File name too long"),
    ):
        with pytest.raises(UserError, match=message):
            read_bytes(tmp_path / name, "list")


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with whole_file(path) as draft:
        draft.write_text("first")
        assert not path.exists()
    assert path.read_text() == "first"

    def broken_off() -> None:
        with whole_file(path) as draft:
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
