import json
import random
from pathlib import Path

import pytest

from clip_m2df.datasets.manifest import Manifest, Split, Video
from clip_m2df.episodes.files import read_episodes_file, write_episodes_file
from clip_m2df.episodes.plan import EpisodeShape, plan_episode
from clip_m2df.errors import UserError

SHAPE = EpisodeShape(2, 1, 1)
ROOT = "/data"
GOOD = {"support": {"a": ["a/0.mp4"], "b": ["b/0.mp4"]}, "query": {"a": ["a/1.mp4"], "b": ["b/1.mp4"]}}


@pytest.fixture
def split() -> Split:
    rows = [Video(f"{ROOT}/{c}/{v}.mp4", c, "test", c) for c in "abcé" for v in range(4)]
    return Manifest(rows, root=ROOT).split("test")


def read(folder: Path, split: Split, *episodes: object) -> list[object]:
    file = folder / "episodes.jsonl"
    lines = [episode if isinstance(episode, str) else json.dumps(episode) for episode in episodes]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return list(read_episodes_file(file, split, ROOT, SHAPE))


def test_episodes_come_back_as_they_were_written(tmp_path: Path, split: Split) -> None:
    shape = EpisodeShape(3, 2, 2)
    plans = [plan_episode(split, shape, seed=0, episode=i) for i in range(30)]
    file = tmp_path / "folder" / "episodes.jsonl"
    write_episodes_file(file, plans, split, ROOT)
    assert read_episodes_file(file, split, ROOT, shape) == plans
    first = json.loads(file.read_text(encoding="utf-8").splitlines()[0])
    assert list(first["support"]) == [split.class_names[c] for c in plans[0].classes]
    assert all(path.startswith(f"{label}/") for label, paths in first["query"].items() for path in paths)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_unknown_queries_come_back_too(tmp_path: Path, split: Split) -> None:
    shape = EpisodeShape(2, 1, 1, 5)
    plans = [plan_episode(split, shape, seed=0, episode=i) for i in range(30)]
    file = tmp_path / "episodes.jsonl"
    write_episodes_file(file, plans, split, ROOT)
    assert read_episodes_file(file, split, ROOT, shape) == plans
    first = json.loads(file.read_text(encoding="utf-8").splitlines()[0])
    assert sorted(map(len, first["unknown"].values())) == [2, 3]
    # They are left out where nobody asks for them.
    assert read_episodes_file(file, split, ROOT, SHAPE) == [plan._replace(unknown=()) for plan in plans]
    with pytest.raises(UserError, match=r"line 1 .* it has 5 unknown queries, but unknown_queries is 4"):
        read_episodes_file(file, split, ROOT, EpisodeShape(2, 1, 1, 4))


@pytest.mark.parametrize(
    ("unknown", "message"),
    [
        (None, "it has 0 unknown queries, but unknown_queries is 1"),
        ({}, "it has 0 unknown queries"),
        (["c/0.mp4"], 'expected "unknown" to be an object that has a list of paths by label'),
        ({"c": "c/0.mp4"}, 'expected "unknown" to be an object'),
        ({"a": ["a/2.mp4"]}, "the class 'a' has support, and so can't be an unknown one"),
        ({"x": ["x/2.mp4"]}, "there is no class 'x' in the split: use the manifest's labels"),
        ({"c": ["c/7.mp4"]}, "the split has no video 'c/7.mp4' of the class 'c'"),
        ({"c": ["a/2.mp4"]}, "the split has no video 'a/2.mp4' of the class 'c'"),
        ({"c": ["c/0.mp4", "c/0.mp4"]}, "the video 'c/0.mp4' comes twice"),
        ({"c": ["c/0.mp4"], "C": ["c/1.mp4"]}, "it has one class in two spellings"),
    ],
)
def test_unknown_queries_at_fault_are_named_by_their_line(
    tmp_path: Path, split: Split, unknown: object, message: str
) -> None:
    episode = json.dumps(GOOD if unknown is None else GOOD | {"unknown": unknown})
    with pytest.raises(UserError, match=f"line 1 of the episodes file .*: {message}"):
        read_episodes_file(_write(tmp_path, episode), split, ROOT, EpisodeShape(2, 1, 1, 1))
    read_episodes_file(_write(tmp_path, episode), split, ROOT, SHAPE)


def test_a_query_with_a_twin_is_refused_where_episodes_are_to_be_grouped(tmp_path: Path) -> None:
    rows = [Video(f"{ROOT}/{c}/{v}.mp4", c, "test", c, {"group": f"{v // 2}"}) for c in "abc" for v in range(4)]
    split = Manifest(rows, root=ROOT).split("test")
    grouped = EpisodeShape(2, 1, 1, 1, grouped=True)
    apart = {"support": GOOD["support"], "query": {"a": ["a/2.mp4"], "b": ["b/3.mp4"]}, "unknown": {"c": ["c/2.mp4"]}}
    file = _write(tmp_path, json.dumps(apart))
    assert read_episodes_file(file, split, ROOT, grouped)[0].twins == [False, False]
    for twin, path in (
        ({"query": {"a": ["a/2.mp4"], "b": ["b/1.mp4"]}}, "b/1"),
        ({"unknown": {"c": ["c/0.mp4"]}}, "c/0"),
    ):
        file = _write(tmp_path, json.dumps(apart | twin))
        read_episodes_file(file, split, ROOT, EpisodeShape(2, 1, 1, 1))
        with pytest.raises(
            UserError, match=f"line 1 .* the query '{path}.mp4' is of the group '0', and so is a support"
        ):
            read_episodes_file(file, split, ROOT, grouped)


def test_what_another_tool_may_write_otherwise(tmp_path: Path, split: Split) -> None:
    wanted = read(tmp_path, split, GOOD)
    absolute = {"support": {"a": ["/data/a/0.mp4"], "b": ["./b/../b/0.mp4"]}, "query": GOOD["query"], "seed": 3}
    assert read(tmp_path, split, absolute, "", "  ") == wanted
    (plan,) = read_episodes_file(_write(tmp_path, "\ufeff" + json.dumps(GOOD) + "\r\n"), split, ROOT, SHAPE)
    assert plan == wanted[0]
    # Queries of one class only are still an episode.
    (plan,) = read_episodes_file(
        _write(tmp_path, json.dumps(GOOD | {"query": {"b": ["b/1.mp4", "b/2.mp4"]}})), split, ROOT, SHAPE
    )
    assert [len(row) for row in plan.query] == [0, 2]


def _write(folder: Path, text: str) -> Path:
    file = folder / "episodes.jsonl"
    file.write_bytes(text.encode())
    return file


@pytest.mark.parametrize(
    ("episode", "message"),
    [
        ("{", "line 2 of the episodes file .* it is no JSON"),
        ([], 'expected an object with "support" and "query"'),
        ({"support": {}}, 'expected an object with "support" and "query"'),
        (GOOD | {"query": {"a": "a/1.mp4"}}, "a list of paths by label"),
        (GOOD | {"query": {"a": [1], "b": [2]}}, "a list of paths by label"),
        (GOOD | {"support": {"a": ["a/0.mp4"], "d": ["d/0.mp4"]}}, "there is no class 'd' in the split"),
        (GOOD | {"query": {"c": ["c/1.mp4"]}}, "the class 'c' has queries, but no support"),
        (GOOD | {"query": {"a": ["b/1.mp4"]}}, "no video 'b/1.mp4' of the class 'a': paths start at /data"),
        (GOOD | {"query": {"a": ["a/9.mp4"]}}, "no video 'a/9.mp4' of the class 'a'"),
        (GOOD | {"query": {"a": ["a/0.mp4"]}}, "the video 'a/0.mp4' comes twice"),
        (GOOD | {"support": {"a": ["a/0.mp4"]}, "query": {"a": ["a/1.mp4", "a/2.mp4"]}}, "it has 1 classes, but n_way"),
        (GOOD | {"support": {"a": ["a/0.mp4"], "b": ["b/0.mp4", "b/3.mp4"]}}, "n_shot is 1, but not every class has"),
        (GOOD | {"query": {"a": ["a/1.mp4"]}}, "it has 1 queries, but n_way times n_query_eval is 2"),
        (GOOD | {"query": {"a": ["a\0b"], "b": ["b/1.mp4"]}}, "no video"),
    ],
)
def test_an_episode_at_fault_is_named_by_its_line(tmp_path: Path, split: Split, episode: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, split, GOOD, episode)
    assert "line 2 of the episodes file" in str(caught.value)


def test_files_that_cannot_be_read_or_written(tmp_path: Path, split: Split) -> None:
    with pytest.raises(UserError, match=r"episodes\.jsonl has no episodes"):
        read(tmp_path, split)
    with pytest.raises(UserError, match=r"there is no episodes file .*nowhere\.jsonl: check the name"):
        read_episodes_file(tmp_path / "nowhere.jsonl", split, ROOT, SHAPE)
    (tmp_path / "latin.jsonl").write_bytes("é".encode("latin-1"))
    with pytest.raises(UserError, match=r"line 1 of the episodes file .* is not UTF-8"):
        read_episodes_file(tmp_path / "latin.jsonl", split, ROOT, SHAPE)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write the episodes file"):
        write_episodes_file(tmp_path / "file" / "e.jsonl", [], split, ROOT)


def test_any_damage_ends_in_episodes_or_in_a_line(tmp_path: Path, split: Split) -> None:
    rng = random.Random(0)
    plans = [plan_episode(split, SHAPE, seed=0, episode=i) for i in range(3)]
    file = tmp_path / "episodes.jsonl"
    write_episodes_file(file, plans, split, ROOT)
    whole = file.read_bytes()
    outcomes, said = [], set()
    for _ in range(2500):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            start = rng.randrange(len(data))
            piece = rng.choice([b"", rng.randbytes(3), b'"', b"{", b"[", b"\n", b"1e999", data[start : start + 20]])
            data[start : start + rng.choice([0, 1, 5, 40])] = piece
        file.write_bytes(data)
        try:
            plans = read_episodes_file(file, split, ROOT, SHAPE)
        except UserError as error:
            said.add(str(error))
        else:
            outcomes.append(plans)
    assert len(outcomes) > 20
    assert all(len(plan.classes) == 2 for plans in outcomes for plan in plans)
    assert len(said) > 20
    assert not any("\n" in message for message in said)
