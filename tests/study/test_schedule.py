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
from study import schedule
from study.play import configuration
from study.results import Outcome, Point, Record, read_results
from study.schedule import current, run_study, to_do
from study.settings import Part, Row, Run, Settings
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


@pytest.mark.parametrize("kept", range(11))
def test_a_study_that_was_stopped_goes_on(tmp_path: Path, played: list[Run], kept: int) -> None:
    whole = tmp_path / "whole.jsonl"
    run_study(SETTINGS, whole, tmp_path, Inline())
    lines = whole.read_bytes().splitlines(keepends=True)
    assert len(lines) == 12
    # Stopped in the middle of a line, and of a run that writes several.
    results = tmp_path / "results.jsonl"
    results.write_bytes(b"".join(lines[:kept]) + lines[kept][:20])
    run_study(SETTINGS, results, tmp_path, Inline())
    assert current(SETTINGS, read_results(results)) == current(SETTINGS, read_results(whole))
    assert to_do(SETTINGS, read_results(results)) == []


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


def test_a_trained_tower_gives_every_head_something_to_train() -> None:
    assert not PART.trains("OTAM")
    assert dataclasses.replace(PART, options={"model.freeze_backbone": False}).trains("OTAM")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "quick"])
def test_the_commands_of_a_study_are_those_that_are_run(name: str) -> None:
    settings = Settings.read(ROOT / f"configs/study/{name}.yaml")
    assert {"main", "tower"} == set(settings.parts)
    for part_name, part in settings.parts.items():
        for number, (row, described) in enumerate(part.rows.items()):
            family = part.families[number % len(part.families)]
            rate = part.learning_rates[0] if part.trains(row) else None
            run = Run(part_name, "measure", family, described.weights_of or row, 1, rate)
            program, command, *args = shlex.split(run.command(settings, part.n_shots[0]))
            assert (program, command) == ("clip-m2df", "fit" if rate else "test")
            place = args.index("--config") + 1
            args[place] = str(find_config(args[place]))
            told = Parsed([command, *args]).config[command]
            meant = configuration(run, settings, Path("store"), described.options if described.weights_of else None)
            for section in ("model", "data", "trainer"):
                for option, value in meant[section].items():
                    if option in ("store", "num_workers", "selection", "text_fusion"):
                        continue
                    got = told[section][option]
                    assert got == value or dict(got) == value, (row, option)
            assert told["seed_everything"] == meant["seed_everything"] == 1
            # The test after it takes the model from the checkpoint, and says itself what the row does otherwise.
            after = run.test_command(settings, part.n_shots[0], row)
            assert bool(after) == (command == "fit")
            if after:
                program, verb, *args = shlex.split(after)
                place = args.index("--config") + 1
                args[place] = str(find_config(args[place]))
                tested = Parsed([verb, *args]).config["test"]
                assert (program, verb, tested["ckpt_path"]) == ("clip-m2df", "test", "last")
                for option in ("selection", "text_fusion"):
                    assert tested["model"][option] == meant["model"].get(option, told["model"][option]), row
            # An option that the head does not have is refused.
            build_head(meant["model"].get("head", "m2df"), {"dim": 64, **meant["model"]["head_options"]})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"parts": None}, "start from configs/study/full.yaml"),
        ({"parts": {"main": {"learning_rates": [1e-3, 1e-3]}}}, "a learning rate is there twice"),
        ({"seeds": 3}, "start from configs/study/full.yaml"),
        ({"parts": {"main": {"rows": {"a": {"weights_of": "b"}}}}}, "no row with weights of its own is called"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    text = yaml.safe_load((ROOT / "configs/study/quick.yaml").read_text(encoding="utf-8"))
    if change.get("parts"):
        text["parts"]["main"] |= change["parts"]["main"]
    else:
        text |= change
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(text), encoding="utf-8")
    with pytest.raises(UserError, match=said):
        Settings.read(path)
