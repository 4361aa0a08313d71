"""Which runs there are, and that a study goes on where it was stopped."""

import dataclasses
import shlex
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import pytest
import yaml

from clip_m2df.commands.configs import find_config
from clip_m2df.errors import UserError
from clip_m2df.nn.baselines import build_head
from study import __main__ as command
from study import schedule
from study.play import configuration
from study.results import PARTS, Outcome, Point, Record, read_results
from study.schedule import current, run_study, to_do
from study.settings import FurtherTest, Part, Row, Run, Settings
from tests.commands.test_configs import Parsed

ROOT = Path(__file__).parents[2]
ROWS = {
    "CLIP-M²DF": Row(),
    "sampled": Row({"model.selection": "sample"}, weights_of="CLIP-M²DF"),
    "OTAM": Row({"model.head": "otam", "model.head_options": {}}),
}
PART = Part(("scene",), (1, 5), (1e-3, 1e-2), {}, ROWS, {"noise": (0.3,)}, ("OTAM",))
SETTINGS = Settings((0, 1), 0, {"main": PART})


class Inline(Executor):
    """Runs what is submitted at once, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        future.set_result(fn(*args, **kwargs))
        return future


def records_of(run: Run, settings: Settings, store: Path) -> list[Record]:
    """What playing a run would give; the larger rate is the better."""
    return [
        Record(
            part=run.part,
            purpose=run.purpose,
            family=run.family,
            n_shot=n_shot,
            row=row,
            seed=run.seed,
            lr=run.lr,
            command=run.command(settings, n_shot),
            versions={},
            seconds=1.0,
            settings=run.digest(settings),
            curve=() if run.lr is None else (Point(8, min(run.lr * 10, 1.0)),),
            tests={name: Outcome("01", 5) for name in run.tests(settings, row)},
            weights_of=None if row == run.row else run.row,
        )
        for n_shot, row in run.tested(settings)
    ]


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """The runs that were played, in place of playing them."""
    runs: list[Run] = []

    def play(run: Run, settings: Settings, store: Path) -> list[Record]:
        runs.append(run)
        return records_of(run, settings, store)

    monkeypatch.setattr(schedule, "play", play)
    monkeypatch.setattr(schedule, "render_videos", lambda settings: None)
    monkeypatch.setattr(schedule, "encode_videos", lambda *args: None)
    return runs


def test_each_seed_is_measured_with_the_rate_that_was_chosen(tmp_path: Path, played: list[Run]) -> None:
    results = tmp_path / "results.jsonl"
    run_study(SETTINGS, results, tmp_path, Inline())
    told = [(run.purpose, run.row, run.seed, run.lr) for run in played]
    assert told == [
        ("choose", "CLIP-M²DF", 0, 1e-3),
        ("choose", "CLIP-M²DF", 0, 1e-2),
        ("measure", "OTAM", 0, None),
        ("measure", "CLIP-M²DF", 0, 1e-2),
        ("measure", "CLIP-M²DF", 1, 1e-2),
    ]
    assert len(told) == SETTINGS.count()
    records = read_results(results)
    measured = [(r.row, r.n_shot, r.seed, sorted(r.tests)) for r in records if r.purpose == "measure"]
    assert sorted(measured) == sorted(
        [(row, n_shot, seed, ["clean"]) for row in ("CLIP-M²DF", "sampled") for n_shot in (1, 5) for seed in (0, 1)]
        + [("OTAM", n_shot, 0, ["clean", "noise=0.3"]) for n_shot in (1, 5)]
    )
    assert current(SETTINGS, records) == sorted(records, key=current(SETTINGS, records).index)
    run_study(SETTINGS, results, tmp_path, Inline())
    assert len(played) == len(told)  # nothing is run twice


def test_a_study_that_was_stopped_goes_on(tmp_path: Path, played: list[Run]) -> None:
    whole = tmp_path / "whole.jsonl"
    run_study(SETTINGS, whole, tmp_path, Inline())
    lines = whole.read_bytes().splitlines(keepends=True)
    assert len(lines) == 12
    for kept in range(12):
        # Stopped in the middle of a line, and of a run that writes several.
        results = tmp_path / f"{kept}.jsonl"
        results.write_bytes(b"".join(lines[:kept]) + lines[kept][:20])
        run_study(SETTINGS, results, tmp_path, Inline())
        assert current(SETTINGS, read_results(results)) == current(SETTINGS, read_results(whole)), kept
        assert to_do(SETTINGS, read_results(results)) == []


def test_only_the_videos_of_what_is_left_are_made(
    tmp_path: Path, played: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "results.jsonl"
    run_study(SETTINGS, results, tmp_path, Inline())
    rendered: list[set[str]] = []
    encoded: list[Run] = []
    monkeypatch.setattr(schedule, "render_videos", lambda settings: rendered.append(set(settings.parts)))
    monkeypatch.setattr(schedule, "encode_videos", lambda run, *args: encoded.append(run))
    played.clear()
    more = {"adapters": dataclasses.replace(PART, n_shots=(1,), rows={"LoRA": Row()}, knobs={}, knob_rows=())}
    run_study(dataclasses.replace(SETTINGS, parts={**SETTINGS.parts, **more}), results, tmp_path, Inline())
    # What was there stays as it is.
    assert {run.part for run in played} == {"adapters"}
    assert rendered == [{"adapters"}]
    assert encoded == []
    run_study(SETTINGS, tmp_path / "new.jsonl", tmp_path, Inline())
    assert rendered[1:] == [{"main"}]
    assert encoded


def test_the_command_runs_the_small_study_and_renders_its_page(
    tmp_path: Path, played: list[Run], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setattr(Settings, "read", lambda path: SETTINGS)
    assert command.main(["render", "--quick"]) == 2
    assert "results.jsonl" in capsys.readouterr().err
    quick = tmp_path / "runs/study_quick"
    run_study(SETTINGS, quick / "results.jsonl", tmp_path, Inline())
    # All is done: the command has nothing left to run.
    assert command.main(["run", "--quick", "--workers", "1"]) == 0
    page = (quick / "results_tables.md").read_text(encoding="utf-8")
    assert "| OTAM" in page
    (otam, _) = (record for record in read_results(quick / "results.jsonl") if record.row == "OTAM")
    assert otam.command in page


def test_other_settings_are_run_anew_and_the_old_left_out(tmp_path: Path, played: list[Run]) -> None:
    results = tmp_path / "results.jsonl"
    run_study(SETTINGS, results, tmp_path, Inline())
    played.clear()
    # Another level: all tests of that row, and nothing else.
    harder = dataclasses.replace(PART, knobs={"noise": (0.3, 0.6)})
    run_study(dataclasses.replace(SETTINGS, parts={"main": harder}), results, tmp_path, Inline())
    assert [run.row for run in played] == ["OTAM"]
    played.clear()
    # Another option: all runs of that row.
    wider = dataclasses.replace(PART, rows=ROWS | {"CLIP-M²DF": Row({"model.head_options.depth": 2})})
    settings = dataclasses.replace(SETTINGS, parts={"main": wider})
    run_study(settings, results, tmp_path, Inline())
    assert {run.row for run in played} == {"CLIP-M²DF"}
    assert len(played) == 4
    found = current(settings, read_results(results))
    assert all("depth 2" in record.command for record in found if record.row == "CLIP-M²DF")
    assert len(found) == 12


def test_a_row_may_be_run_on_some_families_and_a_test_with_some_rows(
    tmp_path: Path, played: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {**ROWS, "without PPS": Row({"model.head_options.pps": False}, families=("mixed",))}
    further = {
        "open set": FurtherTest({"data.unknown_queries": 5}),
        "twins, random": FurtherTest({"data.knobs.twins": 0.5}, ("OTAM", "sampled")),
    }
    part = dataclasses.replace(PART, families=("scene", "mixed"), rows=rows, further=further)
    settings = Settings((0, 1), 0, {"heads": part})
    runs = to_do(settings, [])
    told = [(run.family, run.row) for run in runs if run.purpose == "measure" or run.lr == 1e-3]
    assert told == [
        ("scene", "CLIP-M²DF"),
        ("scene", "OTAM"),
        ("mixed", "CLIP-M²DF"),
        ("mixed", "OTAM"),
        ("mixed", "without PPS"),
    ]
    assert settings.count() == 3 * (2 + 2) + 2
    assert {row: [*part.tests(row)] for row in rows} == {
        "CLIP-M²DF": ["clean", "open set"],
        "sampled": ["clean", "open set", "twins, random"],
        "OTAM": ["clean", "noise=0.3", "open set", "twins, random"],
        "without PPS": ["clean", "open set"],
    }
    # Each rendering of the tests is encoded once.
    videos: list[tuple[str, str]] = []
    monkeypatch.setattr(schedule, "encode_videos", lambda run, _, store, test: videos.append((run.family, test)))
    run_study(settings, tmp_path / "results.jsonl", tmp_path, Inline())
    assert videos == [(f, test) for f in part.families for test in ("", "", "clean", "noise=0.3", "twins, random")]
    records = read_results(tmp_path / "results.jsonl")
    assert {r.family for r in records if r.row == "without PPS"} == {"mixed"}
    assert {r.family for r in records if r.row == "sampled"} == {"scene", "mixed"}


def test_records_of_before_are_those_of_todays_settings() -> None:
    settings = Settings.read(ROOT / "configs/study/full.yaml")
    before = {name: part for name, part in settings.parts.items() if name != "heads"}
    records = read_results(ROOT / "study/results.jsonl")
    assert to_do(dataclasses.replace(settings, parts=before), records) == []


def test_a_trained_tower_gives_every_head_something_to_train() -> None:
    assert not PART.trains("OTAM")
    assert dataclasses.replace(PART, options={"model.freeze_backbone": False}).trains("OTAM")


def test_a_tower_may_learn_at_a_share_of_the_heads_rate() -> None:
    rows = {"same": Row(), "slower": Row(tower_rate=0.1)}
    settings = Settings((0,), 0, {"adapters": dataclasses.replace(PART, rows=rows)})
    same, slower = (Run("adapters", "measure", "scene", row, 0, 3e-3).options(settings) for row in rows)
    assert "model.backbone_lr" not in same
    assert slower == same | {"model.backbone_lr": 3e-4}
    read = Settings.read(ROOT / "configs/study/full.yaml").parts["adapters"].rows
    assert [read[name].tower_rate for name in ("frozen tower", "LoRA", "full training")] == [1, 0.3, 0.1]
    assert not any("tower_rate" in row.options for row in read.values())


def parsed(command: str) -> tuple[str, Any]:
    """What a command line asks for: its verb, and the config that it comes to."""
    program, verb, *args = shlex.split(command)
    assert program == "clip-m2df"
    value = args.index("--config") + 1
    args[value] = str(find_config(args[value]))
    return verb, Parsed([verb, *args]).config[verb]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "quick"])
def test_the_commands_of_a_study_are_those_that_are_run(name: str) -> None:
    settings = Settings.read(ROOT / f"configs/study/{name}.yaml")
    assert set(settings.parts) == set(PARTS)
    for part_name, part in settings.parts.items():
        for number, (row, described) in enumerate(part.rows.items()):
            families = described.families or part.families
            family = families[number % len(families)]
            rate = part.learning_rates[0] if part.trains(row) else None
            run = Run(part_name, "measure", family, described.weights_of or row, 1, rate)
            verb, told = parsed(run.command(settings, part.n_shots[0]))
            assert verb == ("fit" if rate else "test")
            meant = configuration(run, settings, Path("store"), described.options if described.weights_of else None)
            for section in ("model", "data", "trainer"):
                for option in meant[section].keys() - {"store", "num_workers", "selection", "text_fusion"}:
                    got, value = told[section][option], meant[section][option]
                    assert got == value or dict(got) == value, (row, option)
            assert told["seed_everything"] == meant["seed_everything"] == 1
            # The test after it takes the model from the checkpoint, and says itself what the row does otherwise.
            after = run.test_command(settings, part.n_shots[0], row)
            assert bool(after) == bool(rate)
            if after:
                verb, tested = parsed(after)
                assert (verb, tested["ckpt_path"]) == ("test", "last")
                for option in ("selection", "text_fusion"):
                    assert tested["model"][option] == meant["model"].get(option, told["model"][option]), row
            # An option that the head does not have is refused.
            build_head(meant["model"].get("head", "m2df"), {"dim": 64, **meant["model"]["head_options"]})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"parts": None}, "start from configs/study/full.yaml"),
        ({"learning_rates": [1e-3, 1e-3]}, "a learning rate is there twice"),
        ({"seeds": 3}, "start from configs/study/full.yaml"),
        ({"rows": {"a": {"weights_of": "b"}}}, "no row with weights of its own is called"),
        ({"tests": {"open set": {"rows": ["b"]}}}, "no row is called"),
        ({"tests": {"closed set": {}}}, "no test is called.*there are open set, twins"),
        ({"rows": {"OTAM": {"families": ["demo"]}}, "knob_rows": []}, "no family of the part is called"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    settings = yaml.safe_load((ROOT / "configs/study/quick.yaml").read_text(encoding="utf-8"))
    (settings["parts"]["main"] if change.keys() <= {*settings["parts"]["main"], "tests"} else settings).update(change)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    with pytest.raises(UserError, match=said):
        Settings.read(tmp_path / "study.yaml")
