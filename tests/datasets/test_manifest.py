import ast
import copy
import itertools
import os
import pickle
import random
import re
from pathlib import Path

import pytest

from clip_m2df.datasets.manifest import SPLITS, Manifest, Video
from clip_m2df.errors import UserError
from tests.project.damage import damage

VALID = """\
path,label,split,text,source
a/1.mp4,draw sword,train,,web
a/2.mp4,draw sword,train,drawing a sword,web
b/1.avi,"Pretending, [something]",train,,"web, old"
"c/it's ""1"" (é).webm",hug,val,,tv
c/2.webm,hug,val,,
d/frames,eat,test,eating,tv
/data/e.mp4,zap,test,,tv
"""


def save(folder: Path, text: str | bytes) -> Path:
    path = folder / "manifest.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def refusal(folder: Path, text: str | bytes, *, check_files: bool = False) -> str:
    """The message with which a manifest is refused."""
    path = save(folder, text)
    with pytest.raises(UserError) as caught:
        Manifest.read(path, check_files=check_files)
    message = str(caught.value)
    assert "manifest" in message
    assert "\n" not in message
    return message


def rows(*lines: str) -> str:
    return "\n".join(["path,label,split", *lines, ""])


def manifest_of(counts: dict[str, int], split: str = "train") -> Manifest:
    return Manifest(Video(f"/v/{c}/{k}.mp4", c, split, c) for c, count in counts.items() for k in range(count))


# Reading


def test_a_manifest_is_read(tmp_path: Path) -> None:
    manifest = Manifest.read(save(tmp_path, VALID), "/data", check_files=False)
    assert list(manifest.splits) == ["train", "val", "test"]
    train = manifest.split("train")
    assert train.name == "train"
    assert train.class_names == ("Pretending, [something]", "draw sword")
    assert train.class_texts == ("Pretending, [something]", "drawing a sword")
    assert [[video.path for video in videos] for videos in train.videos] == [
        [str(tmp_path / "b/1.avi")],
        [str(tmp_path / "a/1.mp4"), str(tmp_path / "a/2.mp4")],
    ]
    assert train.videos[0][0].extra == {"source": "web, old"}
    assert manifest.split("val").videos[0][0].path == str(tmp_path / 'c/it\'s "1" (é).webm')
    assert manifest.split("test").class_names == ("eat", "zap")
    assert [video.path for (video,) in manifest.split("test").videos] == [str(tmp_path / "d/frames"), "/data/e.mp4"]
    assert {video.text for video in manifest.videos if video.label == "draw sword"} == {"drawing a sword"}


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + VALID,
        VALID.replace("\n", "\r\n"),
        VALID.replace("\n", "\n\n"),
        VALID.rstrip("\n"),
        VALID.replace(",train,", ", train ,").replace("path,label", "path, label"),
    ],
    ids=["BOM", "CRLF", "blank lines", "no last line end", "spaces"],
)
def test_what_programs_make_of_a_csv_changes_nothing(tmp_path: Path, text: str) -> None:
    plain = Manifest.read(save(tmp_path, VALID), "/data", check_files=False)
    assert Manifest.read(save(tmp_path, text), "/data", check_files=False).videos == plain.videos


def test_columns_in_any_order_and_a_relative_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, "split,path,label\nval,x/../a.mp4,run\n")
    monkeypatch.chdir(tmp_path)
    (video,) = Manifest.read("manifest.csv", check_files=False).videos
    assert video == Video(str(tmp_path / "a.mp4"), "run", "val", "run", {})


def test_files_and_folders_of_images_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / "frames").mkdir()
    path = save(tmp_path, rows("a.mp4,run,train", "frames,run,train"))
    assert len(Manifest.read(path).videos) == 2


def test_videos_can_be_sent_to_workers_and_compared(tmp_path: Path) -> None:
    manifest = Manifest.read(save(tmp_path, VALID), "/data", check_files=False)
    assert pickle.loads(pickle.dumps(manifest)).videos == copy.deepcopy(manifest).videos == manifest.videos
    assert len(set(manifest.videos)) == 7


# Where videos may lie


@pytest.mark.parametrize("outside", ["/data/b/x.mp4", "../b/x.mp4", "a/../../b/x.mp4", "{folder}-else/x.mp4", ".."])
def test_videos_outside_its_folder_are_refused(tmp_path: Path, outside: str) -> None:
    outside = outside.format(folder=tmp_path)
    path = os.path.normpath(tmp_path / outside)
    message = refusal(
        tmp_path, rows("a.mp4,run,train", f"{outside},run,train", "sub/../b.mp4,run,val".replace("run", "hug"))
    )
    assert (
        f"1 of the 3 videos in the manifest {tmp_path / 'manifest.csv'} lie outside {tmp_path}, the first is {path}: "
        in message
    )
    assert f"allow it with --data.root {os.path.dirname(path)} (clip-m2df check and cache: --root)" in message


def test_the_remedy_names_the_folder_of_all_that_lie_outside(tmp_path: Path) -> None:
    path = save(tmp_path, rows("/my data/x/1.mp4,run,train", "/my data/y/z/2.mp4,run,train", "3.mp4,run,train"))
    with pytest.raises(
        UserError, match=r"2 of the 3 videos .* the first is /my data/x/1\.mp4: .*--data\.root '/my data' "
    ):
        Manifest.read(path, check_files=False)
    with pytest.raises(
        UserError, match=r"1 of the 3 .* lie outside .* and /my data/x, the first is /my data/y/z/2\.mp4"
    ):
        Manifest.read(path, "/my data/x", check_files=False)
    videos = Manifest.read(path, "/my data", check_files=False).videos
    assert [video.path for video in videos] == ["/my data/x/1.mp4", "/my data/y/z/2.mp4", str(tmp_path / "3.mp4")]


def test_the_other_folder_may_be_relative_or_the_whole_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lists").mkdir()
    path = save(tmp_path / "lists", rows("../videos/1.mp4,run,train", ".,run,train"))
    monkeypatch.chdir(tmp_path)
    for root in ("videos", "videos/", ".", "/", tmp_path / "lists" / ".." / "videos"):
        first, second = Manifest.read(path, root, check_files=False).videos
        assert first.path == str(tmp_path / "videos" / "1.mp4")
        assert second.path == str(tmp_path / "lists")  # a folder of images, with its list among them
    with pytest.raises(UserError, match="lie outside"):
        Manifest.read(path, "videos/1.mp", check_files=False)


def test_a_link_that_was_made_in_its_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.mp4").touch()
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "videos").symlink_to(tmp_path / "elsewhere")
    (video,) = Manifest.read(save(tmp_path / "here", rows("videos/a.mp4,run,train"))).videos
    assert video.path == str(tmp_path / "here" / "videos" / "a.mp4")


# Refusing


def test_a_manifest_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no manifest .*none\.csv: check the name; relative names start at"):
        Manifest.read(tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("", 0, "is empty: it needs a header line with the columns path, label, split"),
        ("\ufeff\n", 0, "is empty"),
        (rows(), 0, "has no videos: add a row for each video"),
        ("path,class,split\na.mp4,run,train\n", 0, "no column 'label'; its first line names 'path', 'class', 'split'"),
        ("path;label;split\na.mp4;run;train\n", 0, "no column 'path' and no column 'label' and no column 'split'"),
        ("path,label,split,label\n", 0, "has the column 'label' more than once"),
        (VALID.encode("latin-1"), 5, "is not UTF-8: save the file with that encoding"),
        (rows("a,run,train", "", "b,run"), 4, "another number of cells than the header, 2 and not 3"),
        (rows("a,run,train", "", "b,run, jump,train"), 4, "another number of cells than the header, 4 and not 3"),
        (rows("b.mp4,run,train", ",run,train"), 3, "has an empty path: fill it in or remove the row"),
        (rows("b.mp4,run,train", " ,run,train"), 3, "has an empty path"),
        (rows("b.mp4,run,train", "a, ,train"), 3, "has an empty label"),
        (rows("b.mp4,run,train", "a,run,"), 3, "has an empty split"),
        (rows("a.mp4,run,train", "b.mp4,jump,validation"), 3, "has the split 'validation': it can be train, val, test"),
        (rows("a.mp4,run,train", "b.mp4,a\0b,train"), 3, "a NUL character in a cell"),
        (rows("a.mp4,run,train", "b.mp4,run," + "x" * 200_000), 3, "is not valid CSV (field larger than field limit"),
        (rows("a.mp4,run,train", 'b.mp4,"run"s,train'), 3, "is not valid CSV"),
        (rows("a,run,train", 'b,"run,train'), 3, "is not valid CSV (unexpected end of data): check its quotes"),
        (rows("a,run,train", 'b,"ru\nn",train'), 3, "has a line break or a NUL character in a cell"),
        (rows("a,b,train", "b,c,val", "c,b,test"), 0, "'b' is in two splits, train on line 2 and test on line 4"),
        ("path,label,split,text\na,b,val,t\nb,b,val,\nc,b,val,u", 0, "the class 'b' has two texts in"),
        ("path,label,split,text\na,b,val,t\nb,b,val,\nc,b,val,u", 0, "'t' on line 2 and 'u' on line 4: give it one"),
    ],
    ids=itertools.count(),
)
def test_a_manifest_at_fault(tmp_path: Path, text: str | bytes, line: int, reason: str) -> None:
    message = refusal(tmp_path, text)
    assert reason in message
    assert message.startswith(f"line {line} of the manifest") == (line > 0)


@pytest.mark.parametrize("again", ["v/a.mp4", "./v//a.mp4", "v/../v/a.mp4"])
def test_a_video_that_is_listed_twice(tmp_path: Path, again: str) -> None:
    message = refusal(tmp_path, rows("v/a.mp4,run,train", "v/b.mp4,run,train", f"{again},run,train"))
    assert f"lists the video {tmp_path / 'v/a.mp4'} twice, on line 2 and on line 4: remove one" in message


SPELLINGS = [
    ("HandstandPushups", "HandStandPushups"),
    ("open door", "open_door"),
    ("open door", "Open-Door"),
    ("open door", "opendoor"),
    ("pull\u2010up", "pull-up"),
    ("caf\u00e9", "cafe\u0301"),
    ("\u00dcbung", "u\u0308bung"),
    ("stra\u00dfe", "STRASSE"),
    ("run", "\uff32\uff35\uff2e"),
    ("\ufb01sh", "fish"),
    ("x\u00b2", "x2"),
    ("run", "run\u200b"),
    ("run", "\ufeffrun"),
    ("run", "r\u00adun"),
    ("run", "ru\u200dn"),
    ("run", "\u202erun\u202c"),
    ("run", "run\ufe0f"),
    ("run", "run\u2800"),
    ("run", "r\x07un"),
    ("open\u00a0door", "open door"),
    ("open\u3000door", "open door"),
    ("open  door", "open door"),
    ("\u0130p atla", "ip atla"),
    ("s\u2018arr\u00eater", "s\u2019arr\u00eater"),
]
DISTINCT = [
    *(("run", "runs"), ("11", "1 1"), ("-1", "1"), ("C", "C++"), ("a.b", "ab"), ("_", "-"), ("\u00e9", "e")),
    *(("turn -90", "turn 90"), ("turn_-90", "turn_90"), ("turn (\u221290)", "turn (90)"), ("1 -1", "1 1")),
    *(("2.5 somersaults", "25 somersaults"), ("k\u0131r", "kir"), ("C++", "C#"), ("A+", "A")),
]


@pytest.mark.parametrize(("first", "second"), SPELLINGS)
def test_spellings_of_one_class(tmp_path: Path, first: str, second: str) -> None:
    message = refusal(tmp_path, rows(f"a,{first},train", f"b,{second},test"))
    assert " is in two splits, train on line 2 as " in message
    assert " and test on line 3 of the manifest " in message
    message = refusal(tmp_path, rows(f"a,{first},train", f"b,{second},train"))
    assert message.startswith("one class has two spellings in the manifest ")
    one, other = re.findall(r"('.*') on line 2 and ('.*') on line 3: keep one$", message)[0]
    assert one != other
    assert [ast.literal_eval(name) for name in (one, other)] == [first, second]


@pytest.mark.parametrize(("first", "second"), DISTINCT)
def test_names_that_are_no_spellings_of_one_class(tmp_path: Path, first: str, second: str) -> None:
    manifest = Manifest.read(save(tmp_path, rows(f"a,{first},train", f"b,{second},test")), check_files=False)
    assert [split.class_names for split in manifest.splits.values()] == [(first,), (second,)]


@pytest.mark.parametrize("kind", ["symbolic", "hard", "folder", "parent", "frames"])
def test_one_file_under_two_names(tmp_path: Path, kind: str) -> None:
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "a.mp4").touch()
    first, second = "v/a.mp4", "link.mp4"
    if kind == "symbolic":
        (tmp_path / second).symlink_to("v/a.mp4")
    elif kind == "hard":
        os.link(tmp_path / first, tmp_path / second)
    else:
        (tmp_path / "w").symlink_to("v")
        first, second = ("v", "w") if kind == "frames" else (first, "w/a.mp4" if kind == "folder" else "w/../v/a.mp4")
    path = save(tmp_path, rows(f"{first},x,train", f"{second},y,test"))
    if kind == "parent":
        with pytest.raises(UserError, match=r"lists the video .* twice, on line 2 and on line 3"):
            Manifest.read(path)
        return
    with pytest.raises(UserError) as caught:
        Manifest.read(path)
    expected = f"lists one file twice, as '{first}' ('x', train) and as '{second}' ('y', test): remove one, or let "
    assert expected in str(caught.value)
    assert len(Manifest.read(path, check_files=False).videos) == 2


def test_missing_videos(tmp_path: Path) -> None:
    (tmp_path / "2.mp4").touch()
    message = refusal(tmp_path, rows(*(f"{k}.mp4,run,train" for k in range(9))), check_files=True)
    assert "8 of the 9 videos in the manifest" in message
    assert "are not there: '0.mp4', '1.mp4', '3.mp4', '4.mp4', '5.mp4' and 3 more; " in message
    assert f"relative paths start at {tmp_path}: put the videos there" in message


@pytest.mark.slow
def test_any_damage_ends_in_a_manifest_or_in_a_user_error(tmp_path: Path) -> None:
    rng = random.Random(0)
    scraps = (b",", b'"', b"\n", b"\r", b"\0", b"\xff", b"\xef\xbb\xbf", b"train", b"val", b" ", b"path", b"\xc3\xa9")
    outcomes = {"refused": 0, "read": 0}
    for _ in range(3000):
        data = damage(rng, VALID.encode(), scraps)
        path = save(tmp_path, data)
        try:
            manifest = Manifest.read(path, "/", check_files=False)
        except UserError:
            outcomes["refused"] += 1
            continue
        outcomes["read"] += 1
        # Each of these rows is one line, so what was read can be held against the lines themselves.
        lines = [line for line in re.split("\r\n|\n|\r", data.decode("utf-8-sig")) if line]
        assert len(manifest.videos) == len(lines) - 1
        for video, line in zip(manifest.videos, lines[1:], strict=True):
            assert os.path.isabs(video.path)
            assert video.split in SPLITS
            assert video.split in line
            assert video.label.replace('"', "") in line.replace('"', "")
        assert sum(len(videos) for split in manifest.splits.values() for videos in split.videos) == len(lines) - 1
        manifest.write(path)
        assert Manifest.read(path, "/", check_files=False).digest == manifest.digest
    assert min(outcomes.values()) > 300


# Built from a list


def test_a_list_of_videos_is_checked_by_row() -> None:
    with pytest.raises(UserError, match="the list of videos has no videos"):
        Manifest([])
    videos = [Video("/a.mp4", "run", "train", "run"), Video("/a.mp4", "run", "train", "run")]
    with pytest.raises(UserError, match=r"lists the video /a\.mp4 twice, on row 1 and on row 2"):
        Manifest(videos, source="the importer's list")


def test_a_split_that_is_not_there(tmp_path: Path) -> None:
    manifest = Manifest.read(save(tmp_path, rows("a,run,train", "b,jump,val")), check_files=False)
    with pytest.raises(UserError, match="has no 'test' split: it has train, val; add rows with that split"):
        manifest.split("test")


# The digest


def test_the_digest_tells_what_decides_the_episodes(tmp_path: Path) -> None:
    def digest(text: str) -> str:
        return Manifest.read(save(tmp_path, text), "/data", check_files=False).digest

    assert len(digest(VALID)) == 64
    lines = VALID.splitlines()
    same = [
        VALID.replace(",tv", ",radio"),  # another column
        "\n".join([lines[0], *lines[3:], *lines[1:3]]),  # classes in another order
        VALID.replace("a/1.mp4", "./a/1.mp4"),
    ]
    different = [
        VALID.replace("a/1.mp4", "a/3.mp4"),
        VALID.replace("eating", "dining"),
        VALID.replace("hug", "kiss"),
        VALID.replace("val", "test"),
        "\n".join([lines[0], lines[2], lines[1], *lines[3:]]),  # videos of one class in another order
        "\n".join(lines[:-1]),
    ]
    cells = ["group", *("" if "val" in line else f"g{n // 2}" for n, line in enumerate(lines[1:]))]
    grouped = "\n".join(f"{line},{cell}" for line, cell in zip(lines, cells, strict=True))
    same.append("\n".join(f"{line}," if n else f"{line},group" for n, line in enumerate(lines)))  # nothing is known
    different += [grouped, grouped.replace(",g1", ",g0"), grouped.replace(",g1", ",G1")]
    assert {digest(text) for text in same} == {digest(VALID)}
    assert len({digest(text) for text in [VALID, *different]}) == 1 + len(different)


def test_the_digest_is_kept_when_the_data_set_moves(tmp_path: Path) -> None:
    digests = set()
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        digests.add(Manifest.read(save(tmp_path / name, VALID), "/data", check_files=False).digest)
    assert len(digests) == 1


# Writing


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    manifest = Manifest.read(save(tmp_path, VALID), "/data", check_files=False)
    for folder in (tmp_path, tmp_path / "elsewhere"):
        folder.mkdir(exist_ok=True)
        manifest.write(folder / "copy.csv")
        assert Manifest.read(folder / "copy.csv", "/", check_files=False).videos == manifest.videos
    written = (tmp_path / "copy.csv").read_text(encoding="utf-8").splitlines()
    assert written[0] == "path,label,split,text,source"
    assert written[1] == "a/1.mp4,draw sword,train,drawing a sword,web"
    assert written[-1].startswith("/data/e.mp4,")


def test_the_folder_is_made_where_it_can_be(tmp_path: Path) -> None:
    manifest_of({"run": 1}).write(tmp_path / "new" / "manifest.csv")
    assert (tmp_path / "new" / "manifest.csv").is_file()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write the manifest .*; name a file in a folder that can be written"):
        manifest_of({"run": 1}).write(tmp_path / "file" / "manifest.csv")


def test_a_manifest_moves_with_its_videos(tmp_path: Path) -> None:
    for folder in ("data/a", "data/b"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "1.mp4").touch()
    videos = [Video(str(tmp_path / "data" / c / "1.mp4"), c, "train", c) for c in "ab"]
    Manifest(videos).write(tmp_path / "lists" / "absolute.csv", tmp_path / "elsewhere")
    assert Manifest.read(tmp_path / "lists" / "absolute.csv", tmp_path / "data").videos == tuple(videos)
    for output in ("lists/m.csv", "m.csv", "data/m.csv", "data/lists/m.csv"):
        Manifest(videos).write(tmp_path / output, tmp_path / "data")
        text = (tmp_path / output).read_text()
        assert str(tmp_path) not in text
        assert ".." not in text
        assert Manifest.read(tmp_path / output, tmp_path / "data").videos == tuple(videos)
        moved = tmp_path / "moved" / output
        moved.parent.mkdir(parents=True, exist_ok=True)
        moved.write_text(text)
    with pytest.raises(UserError, match=r"2 of the 2 videos .* name the folder that they start at with --data\.root"):
        Manifest.read(tmp_path / "lists" / "m.csv")
    (tmp_path / "data").rename(tmp_path / "moved" / "renamed")
    for output in ("lists/m.csv", "data/lists/m.csv"):
        found = Manifest.read(tmp_path / "moved" / output, tmp_path / "moved" / "renamed").videos
        assert [video.path for video in found] == [str(tmp_path / "moved" / "renamed" / c / "1.mp4") for c in "ab"]


def test_relative_paths_start_at_the_manifest_where_it_has_their_videos(tmp_path: Path) -> None:
    for folder in ("here", "root"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.mp4").touch()
    path = save(tmp_path / "here", rows("1.mp4,run,train", "2.mp4,run,train"))
    found = Manifest.read(path, tmp_path / "root", check_files=False).videos
    assert [video.path for video in found] == [str(tmp_path / "here" / f"{k}.mp4") for k in (1, 2)]
    for outside in ("../root/1.mp4", str(tmp_path / "root" / "1.mp4")):
        path = save(tmp_path / "here", rows(f"{outside},run,train", "2.mp4,run,train"))
        found = Manifest.read(path, tmp_path / "root", check_files=False).videos
        assert [video.path for video in found] == [str(tmp_path / "root/1.mp4"), str(tmp_path / "here/2.mp4")]


# Texts from elsewhere


def with_texts(folder: Path, *lines: str) -> Manifest:
    (folder / "texts.csv").write_text("\n".join(["label,text", *lines]), encoding="utf-8")
    return manifest_of({"run": 2, "open_door": 1}).with_texts(folder / "texts.csv")


def test_class_texts_from_a_file_take_the_place_of_the_manifests(tmp_path: Path) -> None:
    split = with_texts(tmp_path, 'open_door,"a door, opening"', "another,data set's").split("train")
    assert split.class_names == ("open_door", "run")
    assert split.class_texts == ("a door, opening", "run")
    assert with_texts(tmp_path, "Open Door,opening").split("train").class_texts == ("opening", "run")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "names no class of .*, such as 'run': use its labels"),
        (["Running,running"], "names no class of"),
        (["run,running", "Run,to run"], r"line 3 of the list of class texts .* gives the class 'Run' a second text"),
        (["run,running", "run,to run"], r"line 3 of the list of class texts .* gives the class 'run' a second text"),
        (["run"], r"line 2 of the list of class texts .* another number of cells than the header, 1 and not 2"),
        (["run,"], r"line 2 of the list of class texts .* has an empty text"),
    ],
)
def test_class_texts_at_fault(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        with_texts(tmp_path, *lines)
