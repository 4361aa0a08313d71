import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from clip_m2df.datasets import split_lists as module
from clip_m2df.datasets.split_lists import ListedVideo, SplitLists, read_lists
from clip_m2df.datasets.tree import stem_of
from clip_m2df.errors import UserError
from tests.project.damage import damage

CLASS_FORM = {
    "trainlist03.txt": 'draw sword/a b\nhurling (sport)/-x_000001_000011\ndraw sword/It\'s "1"!\n',
    "vallist03.txt": "hug/c\n",
    "testlist03.txt": "zap/d.avi\n",
}
ID_FORM = {
    "train_few_shot.txt": "train0//videos/draw_sword/a.avi\ntrain1//videos/hug/b.mkv.mp4\n",
    "val_few_shot.txt": "val0//videos/zap/c.avi\n",
    "test_few_shot.txt": "test0//videos/eat/d.avi\n",
}
SSV2_FORM = {"train.txt": "train8/78687\ntrain8/12\ntrain50/42326\n", "val.txt": "val2/9\n", "test.txt": "test18/5\n"}
TEMPLATES = [
    {"id": "78687", "label": "pouring milk", "template": "Pouring [something] into [something]", "placeholders": []},
    {"id": "12", "template": "Pouring [something] into [something]"},
    {"id": "42326", "template": "Closing [something], but [something] opens"},
    {"id": "9", "template": "Opening [something]"},
    {"id": 5, "template": "Poking [something]"},
    {"id": "777", "template": "Never listed"},
]


def save(folder: Path, files: dict[str, str | bytes] | dict[str, str]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return folder


def save_json(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def refusal(read: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        read()
    message = str(caught.value)
    assert "\n" not in message
    return message


def refusal_of_lists(
    tmp_path: Path, files: dict[str, str | bytes] | dict[str, str], dataset: str = "kinetics100"
) -> str:
    folder = save(tmp_path / "lists", files)
    return refusal(lambda: read_lists(folder, dataset))


# Forms


def test_class_and_video(tmp_path: Path) -> None:
    assert read_lists(save(tmp_path, CLASS_FORM), "kinetics100") == SplitLists(
        {"train": ("draw sword", "hurling (sport)"), "val": ("hug",), "test": ("zap",)},
        (
            ListedVideo("train", "draw sword", "draw sword/a b", "a b"),
            ListedVideo("train", "hurling (sport)", "hurling (sport)/-x_000001_000011", "-x_000001_000011"),
            ListedVideo("train", "draw sword", 'draw sword/It\'s "1"!', 'It\'s "1"!'),
            ListedVideo("val", "hug", "hug/c", "c"),
            ListedVideo("test", "zap", "zap/d.avi", "d"),
        ),
    )


def test_numbers_and_paths_name_the_class_by_its_folder(tmp_path: Path) -> None:
    lists = read_lists(save(tmp_path, ID_FORM), "kinetics100")
    assert lists.classes == {"train": ("draw_sword", "hug"), "val": ("zap",), "test": ("eat",)}
    assert lists.videos is not None
    assert ListedVideo("train", "hug", "train1//videos/hug/b.mkv.mp4", "b") in lists.videos


@pytest.mark.parametrize("slash", ["/", "//", "//20bn-something-something-v2/"])
def test_numbers_alone_take_the_templates_of_their_videos(tmp_path: Path, slash: str) -> None:
    folder = save(tmp_path / "lists", {name: text.replace("/", slash) for name, text in SSV2_FORM.items()})
    first, second = save_json(tmp_path / "a.json", TEMPLATES[:3]), save_json(tmp_path / "b.json", TEMPLATES[3:])
    lists = read_lists(folder, "ssv2", [first, second])
    assert lists.classes == {
        "train": ("Pouring [something] into [something]", "Closing [something], but [something] opens"),
        "val": ("Opening [something]",),
        "test": ("Poking [something]",),
    }
    assert lists.videos is not None
    assert [entry.stem for entry in lists.videos if entry.split == "train"] == ["78687", "12", "42326"]


def test_numbers_alone_take_numbered_names(tmp_path: Path) -> None:
    numbers = SSV2_FORM["train.txt"].replace("train50", "train1").replace("train8", "train0")
    folder = save(tmp_path / "lists", {**SSV2_FORM, "train.txt": numbers, "val.txt": "val0/9", "test.txt": "test0/5"})
    names = {"ssv2_full": {"train": ["Pouring", "Closing"], "test": ["Poking"]}, "hmdb51": {"val": ["hug"]}}
    path = save_json(tmp_path / "class_names.json", names)
    message = refusal(lambda: read_lists(folder, "ssv2", [path]))
    assert "nothing names the classes val0 of the lists (first on line 1 of the list" in message
    assert "give something-something-v2-train.json and something-something-v2-validation.json with --annot" in message
    lists = read_lists(folder, "ssv2", [path, save_json(tmp_path / "a.json", [{"id": "9", "template": "Opening"}])])
    assert lists.classes == {"train": ("Pouring", "Closing"), "val": ("Opening",), "test": ("Poking",)}


def test_names_of_classes(tmp_path: Path) -> None:
    folder = save(tmp_path, {"train.txt": "run\nlong jump\n", "test_classes.txt": "hug\n"})
    assert read_lists(folder, "folder") == SplitLists({"train": ("run", "long jump"), "test": ("hug",)})


def test_one_file_can_hold_all_splits(tmp_path: Path) -> None:
    file = save(tmp_path, {"all": "".join(ID_FORM.values())}) / "all"
    assert read_lists(file, "kinetics100") == read_lists(save(tmp_path / "three", ID_FORM), "kinetics100")


# Lists that others make of all videos


HEADER = "label,youtube_id,time_start,time_end,split"


def kinetics(*rows: str, header: str = HEADER) -> str:
    return "\n".join([header, *rows, ""])


@pytest.mark.parametrize(
    ("header", "row", "name"),
    [
        (HEADER, "open door,-abcdefghij,12,22,train", "-abcdefghij_000012_000022"),
        ("label,youtube_id,time_start,time_end,split,is_cc", '"open door",abc_efghij-,1,11,train,0', None),
        ("youtube_id,time_start,time_end,split,label", "abcdefghijk,1.0,11.0,training,open door", None),
        ("Label;YouTube_ID;split", "open door;abcdefghijk;train", "abcdefghijk"),
        ("label,youtube_id", "open door,abcdefghijk", "abcdefghijk"),
        ("path,start,end,label", "a/open door 3.mp4,12,40,open door", "open door 3"),
        ("video\tclass", "x y.avi\topen door", "x y"),
    ],
)
def test_tables(tmp_path: Path, header: str, row: str, name: str | None) -> None:
    lists = read_lists(save(tmp_path, {"train.csv": kinetics(row, row, header=header)}), "folder")
    assert lists.classes == {"train": ("open door",)}
    assert lists.videos is not None
    (video,) = lists.videos
    assert (video.split, video.label, video.line) == ("train", "open door", row)
    assert video.stem == (name or video.stem)
    assert lists.by_id == ("youtube_id" in header.lower())
    assert len(lists.remarks) == ("start,end" in header)


def test_a_table_says_the_split_itself(tmp_path: Path) -> None:
    rows = [f"{c},{c * 11},1,11,{split}" for c, split in zip("abcd", ("train", "validate", "val", "test"), strict=True)]
    lists = read_lists(save(tmp_path, {"all.csv": kinetics(*rows)}) / "all.csv", "kinetics100")
    assert lists.classes == {"train": ("a",), "val": ("b", "c"), "test": ("d",)}
    assert read_lists(save(tmp_path / "folder", {"all.csv": kinetics(*rows)}), "kinetics100") == lists
    message = refusal_of_lists(tmp_path, {"all.csv": kinetics(rows[0], "e,eeeeeeeeeee,1,11,holdout")})
    assert "line 3 of the list" in message
    assert "has the split 'holdout': it can be train, val, test" in message


@pytest.mark.parametrize("destroyed", ["#NAME?", "#VALUE!", "", "1.2E+11", "abc"])
def test_ids_that_a_spreadsheet_destroyed(tmp_path: Path, destroyed: str) -> None:
    text = kinetics("open door,-abcdefghij,1,11,train", f"wave,{destroyed},3,13,train")
    lists = read_lists(save(tmp_path / "lists", {"train.csv": text}), "kinetics100")
    assert lists.classes == {"train": ("open door",)}
    assert lists.remarks == (
        "passed over 1 lines without the id of a video, which a spreadsheet may have destroyed: "
        f"'wave,{destroyed},3,13,train' on line 3 of the list {tmp_path / 'lists' / 'train.csv'}",
    )
    message = refusal_of_lists(tmp_path / "lists", {"train.csv": kinetics(f"wave,{destroyed},3,13,train")})
    assert "has no id of a video, and so have all others" in message


@pytest.mark.parametrize(
    "lines",
    [
        ["open door/open door 0.mp4 0", "drink (1)/drink (1) 1.mp4 1"],
        ["open door/a.mp4,0", "drink (1)/b.avi,1"],
        ["/data/k400/open door/a.mp4\t0", "/data/k400/drink (1)/b.avi\t1"],
        ['"open door/a.mp4" 0', '"drink (1)/b.avi" 1'],
        ["open door/a.mp4 12 40 0", "drink (1)/b.webm 1 90 1"],
        ["open door/a.mp4 12.5 40.25 open door", "drink (1)/b.webm 1 90 drink (1)"],
        ["v/a.mp4,12,40,open door", "v/b.webm,1,90,drink (1)"],
        ["open door/clip 3 163 0", "open door/clip 4 12 0", "drink (1)/clip 5 90 1"],
        ["open door/clip_a 12 163 0", "drink (1)/clip_b 1 90 1"],
        ["open door/a 0", "open door/b 0", "drink (1)/c 1"],
    ],
)
def test_paths_with_numbers(tmp_path: Path, lines: list[str]) -> None:
    lists = read_lists(save(tmp_path, {"train_list_videos.txt": "\n".join(lines)}), "folder")
    assert lists.classes == {"train": ("open door", "drink (1)")}
    assert [video.line for video in lists.videos or ()] == lines
    assert not any(re.search(r"\.(mp4|avi|webm)|[\"\t,]| \d+ \d+$", video.stem) for video in lists.videos or ())


def test_names_that_end_in_numbers_are_no_classes(tmp_path: Path) -> None:
    lists = read_lists(save(tmp_path, {"train.txt": "eat/eat 0\neat/eat 1\nkick/kick 0\n"}), "folder")
    assert lists.classes == {"train": ("eat", "kick")}
    assert [video.stem for video in lists.videos or ()] == ["eat 0", "eat 1", "kick 0"]
    lists = read_lists(save(tmp_path, {"train.txt": "jump 1\njump 2\n"}), "folder")
    assert (lists.classes, lists.videos) == ({"train": ("jump 1", "jump 2")}, None)


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("map.txt", "open door\nwave\n"),
        ("classInd.txt", "1 open door\r\n2 wave\r\n"),
        ("map.csv", "id,name\n1,open door\n2,wave\n"),
        ("map.csv", "name,id\nopen door,1\nwave,2\n"),
        ("map.json", '["open door", "wave"]'),
        ("map.json", '{"open door": 1, "wave": "2"}'),
        ("map.json", '{"1": "open door", "2": "wave"}'),
    ],
)
def test_numbers_of_classes_by_an_index(tmp_path: Path, name: str, index: str) -> None:
    save(tmp_path, {name: index})
    folder = save(tmp_path / "lists", {"train.txt": "a.mp4 1\n", "test.txt": "b.mp4 2\n"})
    assert read_lists(folder, "folder", [tmp_path / name]).classes == {"train": ("open door",), "test": ("wave",)}
    folder = save(tmp_path / "lists", {"train.txt": "wave/a.mp4 1\n"})
    message = refusal(lambda: read_lists(folder, "folder", [tmp_path / name]))
    assert "the class number 1 is 'open door' in the annotations, and 'wave' on line 1 of the list" in message


def test_lists_of_something_something(tmp_path: Path) -> None:
    rows = {
        "train.csv": "12;Pouring something, slowly\n9;Pouring something, slowly\n",
        "dev.csv": "5;Opening something\n",
        "test.csv": "7;Turning 90 degrees\n",
    }
    lists = read_lists(save(tmp_path / "rows", rows), "ssv2")
    assert lists.classes == {
        "train": ("Pouring something, slowly",),
        "val": ("Opening something",),
        "test": ("Turning 90 degrees",),
    }
    assert [video.stem for video in lists.videos or ()] == ["12", "9", "5", "7"]
    save(tmp_path, {"labels.json": json.dumps({"Opening something": "0", "Pouring something": "1"})})
    numbered = save(tmp_path / "lists", {"train_videos.txt": "12.webm 1\n9.webm 1\n", "val_videos.txt": "5.webm 0\n"})
    lists = read_lists(numbered, "ssv2", [tmp_path / "labels.json"])
    assert lists.classes == {"train": ("Pouring something",), "val": ("Opening something",)}


def test_numbers_of_classes_by_the_folders_of_the_files(tmp_path: Path) -> None:
    folder = save(tmp_path / "lists", {"train.txt": "v/a.mp4 0\nv/b.mp4 1\n"})
    assert "nothing names the classes number 0, number 1 of the lists" in refusal(lambda: read_lists(folder, "folder"))
    lists = read_lists(folder, "folder", folder_of={"a": "open door", "b": "wave"}.__getitem__)
    assert lists.classes == {"train": ("open door", "wave")}


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (
            {"train.csv": kinetics("run,abcdefghijk,1,2,train"), "test.csv": kinetics("run,bbcdefghijk,1,2,test")},
            "so keep it in one; lists as Kinetics' own divide videos and not classes",
        ),
        (
            {"train.txt": "run/a.mp4 0", "test.txt": "run/b.mp4 0"},
            "so keep it in one; lists as those of MMAction2 and TSN divide videos and not classes",
        ),
        ({"test.csv": "youtube_id,time_start,time_end,split\nabcdefghijk,1,11,test"}, "but none with the class, as"),
        ({"train.csv": kinetics("run,abcdefghijk")}, "it should be a cell for each column, as its other lines"),
        ({"train.csv": kinetics('"run,abcdefghijk,1,2,train')}, "it should be a cell for each column"),
        ({"train.csv": kinetics()}, "train.csv is empty: give one with a video on each line"),
        ({"train.txt": "a/b.mp4 0\na/c.mp4 0\na/d.mp4\n"}, "line 3 of the list"),
        ({"train.txt": "a/b.mp4 0\na/c.mp4 0\na/d.mp4\n"}, "it should be a path, its start and end or number of"),
        ({"train.txt": "a/b.mp4 0\nc/d.mp4 0\n"}, "the class number 0 is 'a' on line 1 of the list"),
    ],
)
def test_lists_of_all_videos_that_make_no_sense(tmp_path: Path, files: dict[str, str], reason: str) -> None:
    assert reason in refusal_of_lists(tmp_path, files, "folder")


@pytest.mark.parametrize(
    ("dataset", "entries", "labels"),
    [
        ("hmdb51", ("Brush hair/a", "EAT/b", "kick ball/c"), ["brush_hair", "eat", "kick_ball"]),
        ("ucf101", ("yo_yo/a", "HandStandPushups/b", "Golf Swing/c"), ["YoYo", "HandstandPushups", "GolfSwing"]),
    ],
)
def test_benchmarks_spell_their_own_classes(
    tmp_path: Path, dataset: str, entries: tuple[str, ...], labels: list[str]
) -> None:
    files = dict(zip(("train.txt", "val.txt", "test.txt"), entries, strict=True))
    lists = read_lists(save(tmp_path, files), dataset)
    assert [names[0] for names in lists.classes.values()] == labels


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "\ufeff" + text,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("\n", "\r"),
        lambda text: text.replace("\n", "  \t\n\n"),
        lambda text: text.rstrip("\n"),
        lambda text: text + text,
        lambda text: "# made by hand\n" + text,
    ],
    ids=["BOM", "CRLF", "CR", "spaces and blank lines", "no last line end", "every line twice", "a comment"],
)
@pytest.mark.parametrize("form", [CLASS_FORM, ID_FORM])
def test_what_editors_do_changes_nothing(tmp_path: Path, form: dict[str, str], change: Callable[[str], str]) -> None:
    plain = read_lists(save(tmp_path / "plain", form), "kinetics100")
    changed = read_lists(save(tmp_path / "changed", {n: change(t) for n, t in form.items()}), "kinetics100")
    assert changed == plain


@pytest.mark.parametrize(
    "names",
    [
        ("train.list", "val.list", "test.list"),
        ("trainlist07.txt", "vallist07.txt", "testlist07.txt"),
        ("Training.csv", "Validation.csv", "Testing.csv"),
        ("train.txt", "dev.txt", "test.txt"),
        ("hmdb_train_classes", "hmdb_valid_classes", "hmdb_test_classes"),
        ("kinetics100train.txt", "kinetics100val.txt", "kinetics100test.txt"),
    ],
)
def test_the_split_is_a_word_of_the_name(tmp_path: Path, names: tuple[str, ...]) -> None:
    lists = read_lists(save(tmp_path, dict(zip(names, ["a/1", "b/2", "c/3"], strict=True))), "kinetics100")
    assert lists.classes == {"train": ("a",), "val": ("b",), "test": ("c",)}


def test_other_files_in_the_folder_are_passed_over(tmp_path: Path) -> None:
    save(tmp_path, CLASS_FORM)
    save(tmp_path / "train", {"train.txt": "x/y"})
    other: dict[str, str | bytes] = {
        ".train.txt": "x/y",
        "README.md": "Lists.\n",
        "latest.txt": "x/y",
        "train.json": "[]",
        "train.mp4": "",
        "notes": b"\xff",
    }
    assert read_lists(save(tmp_path, other), "kinetics100").classes["train"] == ("draw sword", "hurling (sport)")


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("x.mkv.mp4", "x"),
        ("x.WebM", "x"),
        ("-kYz.x_1.avi", "-kYz.x_1"),
        ("x.y", "x.y"),
        (".mp4", ".mp4"),
        ("e\u0301.mp4", "é"),
        ("78687", "78687"),
    ],
)
def test_stems(name: str, stem: str) -> None:
    assert stem_of(name) == stem


# Refusals


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "there is no split list in"),
        ({"train.txt": "a/1", "test.txt": "b/2"}, "there is no list of the val split in"),
        ({**CLASS_FORM, "train.list": "x/y"}, "are both lists of the train split: give a folder with one list a split"),
        ({**ID_FORM, "more.txt": "val9//x/new/y.avi"}, "are both lists of the val split"),
        ({**CLASS_FORM, "vallist03.txt": " \n\n"}, "vallist03.txt is empty: give one with a video on each line"),
        ({**CLASS_FORM, "train_test.txt": "x/y"}, "says test and train: put train, val or test into it"),
        ({**CLASS_FORM, "vallist03.txt": "a/1\nb/2\n\nrest\n"}, "line 4 of the list"),
        ({**CLASS_FORM, "vallist03.txt": "a/1\n/2\n"}, "is '/2': it should be class/video, as its other lines"),
        ({**CLASS_FORM, "vallist03.txt": "a/1\nb/\n"}, "is 'b/': it should be class/video"),
        ({**CLASS_FORM, "vallist03.txt": "a/1\nb/x\0y\n"}, r"is 'b/x\x00y': it should be class/video"),
        ({**CLASS_FORM, "vallist03.txt": "a/" + "x" * 5000}, "…': it should be class/video"),
        ({**CLASS_FORM, "vallist03.txt": b"a/1\nb/\xff\n"}, "vallist03.txt is not UTF-8: save the file with"),
        ({**ID_FORM, "val_few_shot.txt": "val0//a/b\nval1//c/d\nvall/x"}, "is 'vall/x': it should be train8/video or"),
        ({**ID_FORM, "val_few_shot.txt": "val0//a/b\nval1//c/"}, "line 2 of the list"),
        ({**ID_FORM, "val_few_shot.txt": "val0//a/b\nval0//c/d"}, "the class val0 is 'a' on line 1 of the list"),
        ({**ID_FORM, "val_few_shot.txt": "val0//a/b\nval1//a/d"}, "the class 'a' has two numbers, val0 on line 1"),
        ({**CLASS_FORM, "vallist03.txt": "Draw_Sword/1"}, "the class 'Draw_Sword' is in two splits, train on line 1"),
        ({"train.txt": "a", "val.txt": "b", "test.txt": "c/1"}, "some lists in"),
        ({"train.txt": "a", "val.txt": "b", "test.txt": "c"}, "but the splits of kinetics100 are lists of videos"),
        (SSV2_FORM, "nothing names the classes train8, train50, val2, test18 of the lists"),
    ],
)
def test_lists_that_make_no_sense(tmp_path: Path, files: dict[str, str | bytes], reason: str) -> None:
    assert reason in refusal_of_lists(tmp_path, files)


def test_lists_of_another_data_set(tmp_path: Path) -> None:
    message = refusal_of_lists(tmp_path, CLASS_FORM, "ucf101")
    assert message.startswith("line 1 of the list")
    assert "has the class 'draw sword', which ucf101 doesn't have: give its own lists, or prepare folder for" in message


def test_lists_that_are_not_there(tmp_path: Path) -> None:
    message = refusal(lambda: read_lists(tmp_path / "none", "hmdb51"))
    assert "there is no file or folder" in message
    assert "--lists names a folder with split lists" in message


def test_a_huge_file_is_no_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 1 << 20)
    save(tmp_path, {**CLASS_FORM, "train": "x" * (3 << 20)})
    assert len(read_lists(tmp_path, "kinetics100").classes) == 3
    assert "has more than 1 MiB, too many for a split list" in refusal(lambda: read_lists(tmp_path / "train", "folder"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "are no JSON (Expecting value: line 1 column 1 (char 0)): give something-something-v2-train.json"),
        (b"\xff", "annotations.json is not UTF-8"),
        (b"[" * 100_000, "annotations.json are no JSON"),
        (b'[{"id": "1"}]', "have no templates, as those of SSv2's test videos"),
        (b"[]", "have no templates"),
        (b"[1]", "entry 1 of the annotations"),
        (b'[{"id": "1", "template": " "}]', "is not the name of a class: give it a line of plain text"),
        (b'[{"id": "1", "template": "\\ud800"}]', "is not the name of a class"),
        (b'[{"id": "1", "template": "a"}, {"id": "1", "template": "b"}]', "call '1' 'b', but it is 'a' as well"),
        (b'{"Approaching something with your camera": "0"}', "nothing names the classes train8, train50, val2"),
        (b'{"ssv2": {"train": "x"}}', "'train' of ssv2 in the annotations"),
        (b'{"ssv2": {"train": [1]}}', "name 0 of 'train' of ssv2 in the annotations"),
        (b"3", "don't say which video is of which class"),
    ],
)
def test_annotations_that_make_no_sense(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "annotations.json"
    path.write_bytes(content)
    assert reason in refusal(lambda: read_lists(save(tmp_path / "lists", SSV2_FORM), "ssv2", [path]))


def test_a_number_with_two_templates(tmp_path: Path) -> None:
    path = save_json(tmp_path / "a.json", [*TEMPLATES[:1], {"id": "12", "template": "Else"}, *TEMPLATES[2:]])
    message = refusal(lambda: read_lists(save(tmp_path / "lists", SSV2_FORM), "ssv2", [path]))
    assert "the class train8 is 'Pouring [something] into [something]' on line 1 of the list" in message
    assert "and 'Else' on line 2 of the list" in message


def test_annotations_that_are_not_there(tmp_path: Path) -> None:
    folder = save(tmp_path / "lists", SSV2_FORM)
    assert "there is no annotations file" in refusal(lambda: read_lists(folder, "ssv2", [tmp_path / "none.json"]))
    assert "is a folder: name the file itself" in refusal(lambda: read_lists(folder, "ssv2", [tmp_path]))


# Damage

SCRAPS = (
    *(b"/", b"//", b"\n", b"\r", b"\0", b"\xff", b"\xef\xbb\xbf"),
    *(b"train1", b"val", b" ", b'"', b"\xc3\xa9", b"[", b"}"),
)


def check_damage(path: Path, whole: bytes, read: Callable[[], object]) -> None:
    """Damage a file many times: each time it is read, or refused with one line."""
    rng = random.Random(0)
    messages = []
    for _ in range(2000):
        path.write_bytes(damage(rng, whole, SCRAPS))
        try:
            read()
        except UserError as error:
            messages.append(str(error))
    assert 100 < len(messages) < 1900
    assert not any("\n" in message for message in messages)


@pytest.mark.parametrize(
    ("dataset", "files"),
    [
        ("kinetics100", CLASS_FORM),
        ("kinetics100", ID_FORM),
        ("ssv2", SSV2_FORM),
        ("folder", {"train.txt": "run\nlong jump\n", "val.txt": "hug\n", "test.txt": "zap\n"}),
        ("folder", {"train.csv": kinetics("a b,abcdefghijk,1,2,train", 'c,"-bcdefghijk",3,13,val')}),
        ("folder", {"train.txt": "a/b c.mp4 1 40 0\nd/e.mp4 3 13 1\n", "val.txt": "f/g.mp4 1 2 3"}),
    ],
    ids=["class", "id", "ssv2", "names", "table", "rows"],
)
def test_any_damage_to_a_list_ends_in_a_list_or_in_a_user_error(
    tmp_path: Path, dataset: str, files: dict[str, str]
) -> None:
    folder = save(tmp_path / "lists", files)
    annotations = [save_json(tmp_path / "a.json", TEMPLATES)] if dataset == "ssv2" else []
    name, plain = next(iter(files.items()))
    check_damage(folder / name, plain.encode(), lambda: read_lists(folder, dataset, annotations))


@pytest.mark.parametrize("form", ["templates", "numbered names"])
def test_any_damage_to_annotations_ends_in_names_or_in_a_user_error(tmp_path: Path, form: str) -> None:
    content = TEMPLATES if form == "templates" else {"ssv2": {"train": ["a", "b [c]"], "val": ["d"], "test": ["e"]}}
    path = tmp_path / "a.json"
    check_damage(path, json.dumps(content).encode(), lambda: module.read_annotations([path], "ssv2"))
