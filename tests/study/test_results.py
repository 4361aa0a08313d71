import dataclasses
import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clip_m2df.errors import UserError
from study.results import (
    GROUPED,
    OPEN,
    REFERENCE,
    TWINS,
    Cell,
    Coverage,
    NotMeasuredError,
    Outcome,
    Point,
    Record,
    accuracy,
    append,
    between_tests,
    chosen_rate,
    chosen_score,
    difference,
    knobs,
    metric,
    rates,
    read_coverage,
    read_results,
)

HERE = Cell("main", "scene", 1, "other")


def measurement(row: str, seed: int = 0, correct: str = "0123", lr: float | None = 0.001, **more: Any) -> Record:
    tests = {"clean": Outcome(correct, 5)} | more.pop("tests", {})
    fields: dict[str, Any] = (
        {"part": "main", "purpose": "measure", "family": "scene", "n_shot": 1, "row": row, "seed": seed, "lr": lr}
        | {"command": "clip-m2df fit", "versions": {"torch": "2.6"}, "seconds": 1.5, "settings": "ab", "tests": tests}
        | more
    )
    return Record(**fields)


def choice(row: str, lr: float, val_accuracy: float, **more: Any) -> Record:
    # The first half of the validations does not count.
    curve = (Point(16, 1 - val_accuracy), Point(32, val_accuracy - 0.05), Point(48, val_accuracy + 0.05))
    measured = measurement(row, lr=lr, **{"curve": curve, **more})
    return dataclasses.replace(measured, purpose="choose", tests={})


# Of 5 queries. Seed 0: 1, 1, 0, 2 more than the reference; seed 1: 1, 0, 1, 0 more.
REFERENCES = [measurement(REFERENCE, 0, "1232"), measurement(REFERENCE, 1, "2321")]
OTHERS = [measurement("other", 0, "2334"), measurement("other", 1, "3331")]


def test_a_paired_difference_worked_out_by_hand() -> None:
    found = difference([*REFERENCES, *OTHERS], HERE)
    # Each episode's mean over the seeds, in fifths: 1, 1/2, 1/2, 1. Their mean is 3/4, their deviation 1/4.
    assert found.mean == pytest.approx(0.75 / 5, abs=1e-15)
    # The seeds' means are 1 and 1/2: their deviation is √2/4. Student's t of one degree of freedom is tan(0.95 π/2).
    of_episodes, of_seeds = 1.96 * 0.25 / 5 / 2, math.tan(0.475 * math.pi) * 0.25 / 5
    assert found.interval == pytest.approx(math.sqrt(of_episodes**2 + of_seeds**2), abs=1e-15)
    assert (found.lowest, found.highest) == pytest.approx((0.5 / 5, 1 / 5), abs=1e-15)
    assert (found.seeds, found.episodes) == (2, 4)


def test_an_accuracy_worked_out_by_hand() -> None:
    found = accuracy([*REFERENCES, *OTHERS], HERE._replace(row=REFERENCE))
    # In fifths: 3/2, 5/2, 5/2, 3/2.
    assert found.mean == pytest.approx(2 / 5, abs=1e-15)
    assert found.interval == pytest.approx(1.96 * 0.5 / 5 / 2, abs=1e-15)
    assert found.lowest == found.highest == pytest.approx(2 / 5, abs=1e-15)


def test_many_episodes_are_those_of_a_loop() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 6, (2, 3, 101))
    named = [(row, s, counts[r, s]) for r, row in enumerate((REFERENCE, "other")) for s in range(3)]
    rows = [measurement(row, s, "".join(map(str, correct))) for row, s, correct in named]
    found = difference(rows, HERE)
    each = [sum((int(counts[1, s, i]) - int(counts[0, s, i])) / 5 for s in range(3)) / 3 for i in range(101)]
    mean = sum(each) / 101
    deviation = math.sqrt(sum((value - mean) ** 2 for value in each) / 101)
    assert found.mean == pytest.approx(mean, abs=1e-14)
    of_seeds = statistics.stdev(float((counts[1, s] - counts[0, s]).mean()) / 5 for s in range(3))
    t = 0.95 * math.sqrt(2 / (1 - 0.95**2))  # of two degrees of freedom
    of_both = math.hypot(1.96 * deviation / math.sqrt(101), t * of_seeds / math.sqrt(3))
    assert found.interval == pytest.approx(of_both, abs=1e-14)


def test_the_pairing_of_episodes_matters() -> None:
    together = difference([measurement(REFERENCE, 0, "0123"), measurement("other", 0, "1234")], HERE)
    apart = difference([measurement(REFERENCE, 0, "0123"), measurement("other", 0, "4321")], HERE)
    assert together.mean == pytest.approx(apart.mean, abs=1e-15)
    assert together.interval == pytest.approx(0, abs=1e-15)
    # 4, 2, 0, -2 fifths more: their deviation is √5.
    assert apart.interval == pytest.approx(1.96 * math.sqrt(5) / 5 / 2, abs=1e-15)


def test_the_pairing_of_seeds_matters_not_to_the_mean_but_to_their_range() -> None:
    swapped = [dataclasses.replace(record, seed=1 - record.seed) for record in OTHERS]
    found = difference([*REFERENCES, *swapped], HERE)
    # 3331 and 1232: 2, 1, 0, -1; 2334 and 2321: 0, 0, 1, 3.
    assert (found.lowest, found.highest) == pytest.approx((0.5 / 5, 1 / 5), abs=1e-15)
    assert found.mean == pytest.approx(0.75 / 5, abs=1e-15)


def test_one_run_without_training_is_compared_with_each_seed() -> None:
    found = difference([*REFERENCES, measurement("other", 0, "2222", lr=None)], HERE)
    # 1, 0, -1, 0 and 0, -1, 0, 1: on average 1/2, -1/2, -1/2, 1/2.
    assert (found.mean, found.lowest, found.highest) == (0, 0, 0)
    assert found.interval == pytest.approx(1.96 * 0.5 / 5 / 2, abs=1e-15)
    assert found.seeds == 2
    assert accuracy([*REFERENCES, measurement("other", 0, "2222", lr=None)], HERE).seeds == 1


@pytest.mark.parametrize(
    ("seeds", "established"),
    [
        (["3333", "3233", "3333"], True),  # more than the reference's 2222, throughout
        (["1111", "1211", "1111"], True),  # less
        (["5555", "1222", "2222"], False),  # the seeds don't agree
        (["5555", "3333", "3333"], False),  # nor on how much it is
        (["4220", "2223", "2222"], False),  # smaller than its interval
        (["2222", "2222", "2222"], False),  # none at all
    ],
)
def test_a_difference_is_established_when_it_is_large_and_the_seeds_agree(seeds: list[str], established: bool) -> None:
    records = [measurement(REFERENCE, seed, "2222") for seed in (0, 1, 2)]
    records += [measurement("other", seed, correct) for seed, correct in enumerate(seeds)]
    found = difference(records, HERE)
    assert found.established is established


def test_what_is_missing_is_named() -> None:
    with pytest.raises(NotMeasuredError, match="'other' on scene, 1 shot, frozen tower was not measured with seed 1"):
        accuracy([*REFERENCES, OTHERS[0]], HERE)
    with pytest.raises(NotMeasuredError, match="nothing was measured of 'other' on order, 5 shots, tower trained too"):
        accuracy([*REFERENCES, *OTHERS], Cell("tower", "order", 5, "other"))
    with pytest.raises(NotMeasuredError, match="nothing was measured of 'CLIP-M²DF' on scene"):
        difference(OTHERS, HERE)
    with pytest.raises(NotMeasuredError, match=r"'other'.* has no test 'noise=0.2' with seed 0"):
        accuracy([*REFERENCES, *OTHERS], HERE, "noise=0.2")
    with pytest.raises(NotMeasuredError, match=r"'other'.* has no pps_accuracy"):
        metric([*REFERENCES, *OTHERS], HERE, "clean", "pps_accuracy")


def test_other_episodes_are_refused_by_the_name_of_the_cell() -> None:
    with pytest.raises(UserError, match=r"'other' on scene.* on 3 episodes of 5 queries, 'CLIP-M²DF' on 4 of 5"):
        difference([REFERENCES[0], measurement("other", 0, "123")], HERE)
    with pytest.raises(UserError, match="on 4 episodes of 6 queries, 'CLIP-M²DF' on 4 of 5"):
        difference([REFERENCES[0], measurement("other", tests={"clean": Outcome("1234", 6)})], HERE)
    with pytest.raises(UserError, match=r"seeds of 'other' on scene, 1 shot, frozen tower had other episodes"):
        accuracy([OTHERS[0], measurement("other", 1, "123")], HERE)


def test_a_share_is_the_mean_over_the_seeds_of_the_test() -> None:
    outcomes = [Outcome("12", 5, pps_accuracy=value) for value in (0.5, 0.75)]
    records = [measurement("other", s, tests={"noise=0.2": outcome}) for s, outcome in enumerate(outcomes)]
    assert metric(records, HERE, "noise=0.2", "pps_accuracy")[0] == 0.625


def test_two_tests_of_a_row_are_compared_by_hand() -> None:
    tests = [{GROUPED: Outcome("1232", 5), TWINS: Outcome("233434", 5)}]
    tests += [{GROUPED: Outcome("2321", 5), TWINS: Outcome("333333", 5)}]
    records = [measurement("other", seed, tests=outcomes) for seed, outcomes in enumerate(tests)]
    found = between_tests(records, HERE, TWINS, GROUPED)
    # In fifths: 2 and 2 grouped, 19/6 and 3 at random.
    assert found.mean == pytest.approx((37 / 12 - 2) / 5, abs=1e-15)
    assert (found.lowest, found.highest) == pytest.approx((1 / 5, 7 / 6 / 5), abs=1e-15)
    # The episodes of each test by themselves: 3/2, 5/2, 5/2, 3/2; and 5/2, 3, 3, 7/2, 3, 7/2.
    grouped, twins = (statistics.pstdev(means) / math.sqrt(len(means)) for means in ([1.5, 2.5, 2.5, 1.5], FIFTHS))
    of_seeds = math.tan(0.475 * math.pi) * abs(7 / 6 - 1) / 2 / 5
    of_episodes = 1.96 * math.hypot(grouped, twins) / 5
    assert found.interval == pytest.approx(math.hypot(of_episodes, of_seeds), abs=1e-14)
    # Without training there is one run, and episodes alone.
    (alone,) = (dataclasses.replace(record, lr=None) for record in records[:1])
    grouped, twins = (statistics.pstdev(c) / math.sqrt(len(c)) for c in ([1, 2, 3, 2], [2, 3, 3, 4, 3, 4]))
    found = between_tests([alone], HERE, TWINS, GROUPED)
    assert found.interval == pytest.approx(1.96 * math.hypot(grouped, twins) / 5, abs=1e-14)
    with pytest.raises(NotMeasuredError, match="no test 'open set'"):
        between_tests(records, HERE, OPEN, GROUPED)


# Of an episode each, over both seeds.
FIFTHS = [2.5, 3, 3, 3.5, 3, 3.5]


def test_the_score_is_chosen_by_val_over_all_seeds_and_never_by_the_test() -> None:
    of_seeds = [{"distance": (0.6, 0.9), "margin": (0.8, 0.2)}, {"distance": (0.7, 0.95), "margin": (0.6, 0.3)}]
    records = []
    for seed, scores in enumerate(of_seeds):
        metrics = {f"val/auroc/{name}": on_val for name, (on_val, _) in scores.items()}
        metrics |= {f"auroc/{name}": on_test for name, (_, on_test) in scores.items()}
        records.append(measurement("other", seed, tests={OPEN: Outcome("0123", 5, metrics=metrics)}))
    chosen = chosen_score(records, HERE)
    assert chosen.name == "margin"
    assert (chosen.auroc, chosen.lead) == pytest.approx((0.7, 0.05), abs=1e-15)
    assert metric(records, HERE, OPEN, "auroc/margin") == (0.25, 0.2, 0.3)
    with pytest.raises(NotMeasuredError, match="has no oscr/margin in the test 'open set'"):
        metric(records, HERE, OPEN, "oscr/margin")
    with pytest.raises(NotMeasuredError, match="has no test 'open set'"):
        chosen_score([measurement("other")], HERE)


COVERAGE: dict[str, Any] = (
    {"family": "scene", "n_way": 5, "n_shot": 1, "error": 0.1, "draws": 1000, "seed": 0, "coverage": 0.91}
    | {"interval": 0.01, "unknown_coverage": 0.92, "unknown_interval": 0.02, "set_size": 1.25, "full_share": 0.25}
    | {"empty_share": 0.125, "false_rejection": 0.08, "false_rejection_interval": 0.005}
    | {"command": "python -m study coverage", "versions": {"torch": "2.6"}}
)


def test_lines_of_coverage_are_read_and_the_later_of_a_setting_counts(tmp_path: Path) -> None:
    path = tmp_path / "coverage.jsonl"
    lines = [COVERAGE, COVERAGE | {"error": 0.2}, COVERAGE | {"coverage": 0.5}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert read_coverage(path) == [Coverage(**lines[2]), Coverage(**lines[1])]


@pytest.mark.parametrize(
    "change",
    [
        {"coverage": 91},
        {"false_rejection_interval": -0.1},
        {"empty_share": None},
        {"set_size": float("nan")},
        {"draws": 0},
        {"family": 1},
        {"more": 1},
    ],
)
def test_a_broken_line_of_coverage_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "coverage.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (COVERAGE, COVERAGE | change)), encoding="utf-8")
    with pytest.raises(UserError, match=r"coverage\.jsonl, line 2 is broken"):
        read_coverage(path)


def test_the_later_of_two_lines_of_a_run_counts() -> None:
    found = accuracy([measurement("other", 0, "0000"), measurement("other", 0, "5555")], HERE)
    assert (found.mean, found.seeds) == (1, 1)


def test_the_best_rate_on_val_is_chosen_and_of_equal_ones_the_smallest() -> None:
    records = [choice("other", 0.01, 0.7), choice("other", 0.001, 0.7), choice("other", 0.1, 0.6)]
    # Those of other cells don't count, and neither do measurements.
    elsewhere: list[dict[str, Any]] = [{"family": "order"}, {"n_shot": 5}, {"part": "tower"}]
    records += [choice("other", 1.0, 0.9, **cell) for cell in elsewhere]
    records += [choice("rival", 3.0, 0.9), measurement("other", lr=5.0, curve=(Point(16, 0.9),))]
    assert chosen_rate(records, HERE) == 0.001
    assert rates(records, HERE) == {0.001: 0.7, 0.01: 0.7, 0.1: 0.6}
    assert chosen_rate(reversed(records), HERE) == 0.001
    with pytest.raises(NotMeasuredError, match="no learning rate was tried for 'none' on scene"):
        chosen_rate(records, HERE._replace(row="none"))


def test_a_rate_tried_with_several_seeds_counts_by_their_mean() -> None:
    records = [choice("other", 0.1, v, seed=s) for s, v in enumerate((0.9, 0.5))] + [choice("other", 0.01, 0.75)]
    assert rates(records, HERE) == {0.01: 0.75, 0.1: 0.7}


def test_knobs_are_ordered_by_their_level() -> None:
    outcome = Outcome("1", 5)
    tests = dict.fromkeys(("noise=0.1", "overlap=0.5", "noise=0.05", "noise=1"), outcome)
    assert knobs([measurement("other", tests=tests)]) == {
        "noise": ["noise=0.05", "noise=0.1", "noise=1"],
        "overlap": ["overlap=0.5"],
    }


def test_lines_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.jsonl"
    full = Outcome("012345", 5, 0.5, 0.25, 0.125, 1.0)
    opened = Outcome("0123", 5, metrics={"auroc/margin": 0.5}, options="--data.unknown_queries 5")
    records = [
        choice("CLIP-M²DF", 0.001, 0.6),
        measurement("CLIP-M²DF", tests={"noise=0.2": full}, curve=(Point(160, 0.5), Point(320, 0.625))),
        measurement("argmax", weights_of="CLIP-M²DF", curve=()),
        measurement("OTAM", lr=None, curve=(), tests={OPEN: opened}),
    ]
    for record in records:
        append(path, record)
    assert read_results(path) == records
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines[1]["tests"] == {
        "clean": {"correct": "0123", "n_queries": 5},
        "noise=0.2": {"correct": "012345", "n_queries": 5}
        | {"pps_accuracy": 0.5, "view_agreement": 0.25, "local_accuracy": 0.125, "global_accuracy": 1.0},
    }
    assert lines[3]["tests"][OPEN] == {"correct": "0123", "n_queries": 5} | {
        "metrics": {"auroc/margin": 0.5},
        "options": "--data.unknown_queries 5",
    }
    assert lines[1]["curve"] == [{"episodes": 160, "accuracy": 0.5}, {"episodes": 320, "accuracy": 0.625}]
    assert [line.get("weights_of") for line in lines] == [None, None, "CLIP-M²DF", None]
    assert "weights_of" not in lines[0]


@pytest.mark.parametrize("left", [10, -1, 0], ids=["some", "all but the end of the line", "nothing"])
def test_a_last_line_without_its_end_is_ignored_and_gone_with_the_next(tmp_path: Path, left: int) -> None:
    path = tmp_path / "results.jsonl"
    append(path, OTHERS[0])
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:left])
    assert read_results(path) == [OTHERS[0]]
    append(path, OTHERS[1])
    assert read_results(path) == OTHERS
    # The very first line may be the interrupted one.
    path.write_bytes(whole[:10])
    assert read_results(path) == []
    append(path, OTHERS[1])
    assert read_results(path) == [OTHERS[1]]


def edited(**changes: Any) -> str:
    entry = dataclasses.asdict(measurement("other")) | changes
    return json.dumps({key: value for key, value in entry.items() if value != "gone"})


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (edited()[:40], "Unterminated|Expecting|delimiter"),
        ("[]", "list"),
        ("", "Expecting value"),
        (edited(row="gone"), "row"),
        (edited(more=1), "more"),
        (edited(part="side"), "part 'side' is none of main, tower"),
        (edited(purpose="play"), "purpose 'play'"),
        (edited(n_shot="1"), "n_shot"),
        (edited(seed=True), "seed"),
        (edited(lr=float("nan")), "lr"),
        (edited(tests={}), "needs the test 'clean'"),
        (edited(purpose="choose", curve=[]), "needs lr and a curve"),
        (edited(tests={"clean": {"correct": "126", "n_queries": 5}}), "more queries are correct"),
        (edited(tests={"clean": {"correct": "1 2", "n_queries": 5}}), "digit"),
        (edited(tests={"clean": {"correct": "", "n_queries": 5}}), "digit"),
        (edited(tests={"clean": {"correct": "12", "n_queries": 10}}), "n_queries"),
        (edited(tests={"clean": {"correct": "12", "n_queries": 5, "pps_accuracy": 70}}), "pps_accuracy"),
        (edited(tests={"clean": {"correct": "12", "n_queries": 5, "metrics": {"auroc/margin": 70}}}), "auroc/margin"),
        (edited(tests={"clean": {"correct": "12", "n_queries": 5, "metrics": {"loss": 0.5}}}), "loss"),
        (edited(tests={"clean": {"correct": "12", "n_queries": 5}, "loud": {"correct": "12", "n_queries": 5}}), "loud"),
        (edited(curve=[{"episodes": 1}]), "accuracy"),
    ],
)
def test_another_broken_line_is_named(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "results.jsonl"
    append(path, OTHERS[0])
    path.write_bytes(path.read_bytes() + line.encode() + b"\n")
    append(path, OTHERS[1])
    with pytest.raises(UserError, match=rf"results\.jsonl, line 2 is broken.*({reason})"):
        read_results(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file of results"):
        read_results(tmp_path / "results.jsonl")
