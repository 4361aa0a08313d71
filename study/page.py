"""The study's page. No number on it is typed by hand; the same results give the same bytes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from tabulate import tabulate

from clip_m2df.errors import UserError
from clip_m2df.evaluation.metrics import Z_95
from clip_m2df.files import write_text
from study.figures import draw
from study.results import (
    CLEAN,
    GROUPED,
    INTERVALS,
    OPEN,
    PARTS,
    REFERENCE,
    REFERENCES,
    SHARES,
    TWINS,
    Cell,
    Coverage,
    Estimate,
    Record,
    accuracy,
    between_tests,
    chosen_rate,
    chosen_score,
    difference,
    if_measured,
    knobs,
    measured,
    metric,
    rates,
    shots,
)

NOTHING = "\N{EN DASH}"
SHARE_NAMES = {
    "pps_accuracy": "PPS",
    "local_accuracy": "local view",
    "global_accuracy": "global view",
    "view_agreement": "views agree",
}
OPEN_SET = {"auroc": "AUROC", "oscr": "OSCR", "fpr95": "FPR95"}
TWIN_METRICS = {
    "twin_share": "queries with a twin",
    "accuracy_twins": "accuracy with",
    "accuracy_without_twins": "accuracy without",
}
# The column that says what a row's numbers come from.
FROM = "from"
# Fields of one row, by what they say; those of the open-set test, by the score that val chose.
FIELDS = ("accuracy", "difference", "overstated", *SHARES, *OPEN_SET)
OF_COVERAGE = ("coverage", "unknown_coverage", "set_size", "false_rejection")
SYNTAX = "{accuracy: row | family | shots} or {accuracy: row | family | shots | test}"
TABLES = "results_tables.md"


def render(
    results: Sequence[Record], findings_template: str, output_folder: Path, coverage: Sequence[Coverage] = ()
) -> None:
    """Write ``results.md``, the front page, ``results_tables.md`` and ``figures/results_*.png``.

    Args:
        results: of the study, whole or not: what has not been measured is shown as a dash.
        findings_template: the front page's text, in Markdown; see :func:`filled` for its fields.
        output_folder: where the pages go.
        coverage: how often sets of labels hold the truth.

    Raises:
        UserError: a field that there is not, or of something that has not been measured; runs that don't go together.
    """
    findings = filled(findings_template, results, coverage)
    pictures = draw(results, output_folder / "figures")
    parts = [part for part in PARTS if any(record.part == part for record in results)]
    front = [
        "# Results",
        f"On the embedded benchmark. [All tables, intervals and commands]({TABLES}).",
        findings.strip(),
    ]
    sections = [
        "# Tables of results",
        f"{REFERENCE}, its ablations and baselines on the embedded benchmark. `make study` writes this page and its "
        "[front](results.md) from the lines of `study/results.jsonl` and `study/coverage.jsonl`, numbers and figures "
        "included.",
        *_how(results, parts),
    ]
    for part in parts:
        sections += _main_tables(results, part)
        if part == "main":
            sections += _knob_tables(results, pictures)
            sections += _view_tables(results, pictures)
    sections += [*_open_set_tables(results), *_twin_tables(results), *coverage_table(coverage)]
    if "results_curves.png" in pictures:
        sections += ["## Learning", _image("results_curves.png", "Accuracy on val against training episodes")]
        sections += ["Means over the seeds, and their range."]
    sections += [*_rate_tables(results, parts), *_commands(results, parts, coverage)]
    for name, content in (("results.md", front), (TABLES, sections)):
        write_text(output_folder / name, "page", "\n\n".join(content) + "\n")


def filled(template: str, results: Sequence[Record], coverage: Sequence[Coverage] = ()) -> str:
    """A text with numbers in the place of its fields; whatever is in braces is one.

    ``{accuracy: row | family | shots}`` and ``{difference: …}``, against the full method, are in per cent, with the
    95 % interval; ``pps_accuracy``, ``view_agreement``, ``local_accuracy`` and ``global_accuracy`` are without. With a
    fourth part, ``{accuracy: row | family | shots | noise=0.2}``, they are of that test. ``overstated`` is by how much
    random episodes are above grouped ones of the same clips. ``auroc``, ``oscr`` and ``fpr95`` are by the score that
    val chose. ``tower_accuracy``, ``adapters_difference``, ``heads_auroc`` and so on are of the study's other parts.
    ``{coverage: family | shots | error}``, ``unknown_coverage``, ``set_size`` and ``false_rejection`` are of sets.

    Args:
        template: the text.
        results: of the study.
        coverage: of the study.

    Raises:
        UserError: a field that there is not, or of something that has not been measured.
    """
    text = re.sub(r"\{([^{}]*)\}", lambda match: _value(match[1], results, coverage), template)
    stray = re.search(r"[{}]", text)
    if stray:
        raise UserError(
            f"the findings have a brace without its other: …{text[stray.start() :][:40]!r}; close the field"
        )
    return text


def _value(content: str, results: Sequence[Record], coverage: Sequence[Coverage]) -> str:
    """Of a field."""
    name, _, rest = content.partition(": ")
    words = [word.strip() for word in rest.split("|")]
    if name in OF_COVERAGE:
        return _of_coverage(content, name, words, coverage)
    part = next((part for part in PARTS if name.startswith(f"{part}_")), "main")
    kind = name.removeprefix(f"{part}_")
    if kind not in FIELDS:
        known, others = ", ".join((*FIELDS, *OF_COVERAGE)), ", ".join(f"{part}_" for part in PARTS if part != "main")
        raise UserError(
            f"the findings have an unknown field {{{content}}}: write {known}, or one of them after {others}"
        )
    if len(words) not in (3, 4) or not words[2].isdecimal():
        raise UserError(f"the findings' field {{{content}}} can't be read: write it like {SYNTAX}")
    cell = Cell(part, words[1], int(words[2]), words[0])
    test = words[3] if len(words) == 4 else CLEAN
    try:
        if kind == "accuracy":
            return _accuracy(results, cell, test)
        if kind == "difference":
            return _difference(difference(results, cell, test))
        if kind == "overstated":
            return _difference(between_tests(results, cell, TWINS, GROUPED))
        if kind in OPEN_SET:
            kind, test = f"{kind}/{chosen_score(results, cell).name}", OPEN
        return _percent(metric(results, cell, test, kind)[0])
    except UserError as error:
        raise UserError(f"the findings ask for {{{content}}}: {error}") from error


def _of_coverage(content: str, name: str, words: Sequence[str], coverage: Sequence[Coverage]) -> str:
    """Of a field on sets of labels."""
    for line in coverage:
        if list(words) == [line.family, str(line.n_shot), f"{line.error:g}"]:
            if name == "set_size":
                return f"{line.set_size:.1f}"
            return _within(getattr(line, name), getattr(line, INTERVALS[name]))
    raise UserError(
        f"the findings ask for {{{content}}}, which was not measured: write it like {{{name}: scene | 1 | 0.1}}, or run"
        " python -m study coverage to its end"
    )


def _how(results: Sequence[Record], parts: Sequence[str]) -> list[str]:
    """What was run."""
    rows = []
    for part in parts:
        own = [record for record in results if record.part == part]
        tests = {(len(t.correct), t.n_queries) for record in own for t in record.tests.values()}
        # A run has a line for each row that is tested from its weights, and each number of shots.
        runs = {(r.purpose, r.family, r.weights_of or r.row, r.seed, r.lr) for r in own}
        trained = {record.curve[-1].episodes for record in own if record.curve}
        rows.append(
            [
                PARTS[part],
                ", ".join(f"{episodes:,} of {n_queries} queries" for episodes, n_queries in sorted(tests)) or NOTHING,
                ", ".join(f"{episodes:,}" for episodes in sorted(trained)) or NOTHING,
                ", ".join(str(seed) for seed in sorted({r.seed for r in own if r.purpose == "measure"})) or NOTHING,
                ", ".join(f"{lr:g}" for lr in _grid(own)) or NOTHING,
                str(len(runs)),
                f"{sum(record.seconds for record in own) / 3600:.1f}",
            ]
        )
    others = "".join(f" ({PARTS[part]}: from {REFERENCES[part]})" for part in parts if REFERENCES[part] != REFERENCE)
    return [
        "## How it was done",
        "`make study` runs what has not been run, and writes this page. A learning rate is chosen on val for each "
        "method and family, with one seed and one shot, by the mean over the second half of its validations; then each "
        "seed is tested as it is at the end of its training, on the same episodes for all methods. Training episodes "
        "have one shot, whatever the test's, where the method doesn't say otherwise. `make study QUICK=1` is "
        "a small study with two seeds, of the rows that `configs/study/quick.yaml` names.",
        _table(["", "test episodes", "training episodes", "seeds", "rates tried", "runs", "hours"], rows),
        f"Accuracies are in per cent, with 95 % intervals over the episodes ({Z_95} \N{GREEK SMALL LETTER SIGMA} / √n "
        f"of each episode's mean over the seeds), of these classes and videos. Δ is the difference from "
        f"{REFERENCE}{others}, episode by episode and seed by seed; a method without training has one run, which is "
        "compared with each seed's. Its interval is over the seeds too (Student's t, the squares added), and it is in "
        "bold where it is larger than that. The range is that of the seeds' own means. Each row says what it comes "
        "from: its head, the seeds that were trained or that nothing was, whose weights it has, and what was otherwise "
        "in its training.",
    ]


def _main_tables(results: Sequence[Record], part: str) -> list[str]:
    """Accuracies on the clean test: a table a family."""
    own = [record for record in results if record.part == part]
    columns = sorted({record.n_shot for record in own})
    header = ["method", FROM]
    for n_shot in columns:
        header += [shots(n_shot), f"Δ, {shots(n_shot)}", f"range, {shots(n_shot)}"]
    sections = [f"## Accuracy, {PARTS[part]}"]
    for family in dict.fromkeys(record.family for record in own):
        rows = []
        for row in dict.fromkeys(record.row for record in own if record.family == family):
            cells = [Cell(part, family, n_shot, row) for n_shot in columns]
            texts = [_shown(text, results, c, CLEAN) for c in cells for text in (_accuracy, _marked, _range)]
            rows.append([row, _from(results, *cells), *texts])
        sections += [f"### `{family}`", _table(header, rows)]
    others = {record.row: record.weights_of for record in own if record.weights_of is not None}
    if others:
        said = ", ".join(f"{row} with those of {weights}" for row, weights in others.items())
        sections.append(f"Tested with another row's weights: {said}.")
    return sections


def _knob_tables(results: Sequence[Record], pictures: Sequence[str]) -> list[str]:
    """Accuracies and differences at each level: a table a knob, family and number of shots."""
    own = [record for record in results if record.part == "main"]
    sections = ["## Harder tests"] if knobs(own) else []
    for knob, tests in knobs(own).items():
        sections.append(f"### {knob.capitalize()}")
        if f"results_{knob}.png" in pictures:
            sections.append(_image(f"results_{knob}.png", f"Accuracy against {knob}"))
        for family, n_shot in dict.fromkeys((record.family, record.n_shot) for record in own):
            here = [record for record in own if (record.family, record.n_shot) == (family, n_shot)]
            rows = []
            for row in dict.fromkeys(record.row for record in here if record.tests.keys() & set(tests)):
                cell = Cell("main", family, n_shot, row)
                shown = (_knob_cell(results, cell, test) for test in (CLEAN, *tests))
                rows.append([row, _from(results, cell), *shown])
            if rows:
                sections += [f"`{family}`, {shots(n_shot)}; Δ below the accuracy:"]
                sections.append(_table(["method", FROM, CLEAN, *(test.partition("=")[2] for test in tests)], rows))
    return sections


def _knob_cell(results: Sequence[Record], cell: Cell, test: str) -> str:
    """Accuracy, and the difference below."""
    shown = [_shown(text, results, cell, test) for text in (_accuracy, _marked)]
    return "<br>".join(text for text in shown if text) if shown[0] != NOTHING else NOTHING


def _view_tables(results: Sequence[Record], pictures: Sequence[str]) -> list[str]:
    """What the views and PPS do by themselves."""
    clean, harder = [], []
    own = [record for record in results if record.part == "main" and record.purpose == "measure"]
    for cell in dict.fromkeys(record.cell for record in own):
        for test in dict.fromkeys(test for record in measured(own, cell).values() for test in record.tests):
            found = [if_measured(metric, results, cell, test, name) for name in SHARE_NAMES]
            shares = [_percent(share[0]) if share else NOTHING for share in found]
            line = [*shares, _shown(_accuracy, results, cell, test)]
            # Whoever has no views makes no use of PPS, which is then a number of the tower alone.
            if shares[-1] != NOTHING:
                if test == CLEAN:
                    clean.append([f"`{cell.family}`", str(cell.n_shot), cell.row, _from(results, cell), *line])
                if cell.row == REFERENCE:
                    harder.append([f"`{cell.family}`", str(cell.n_shot), test, _from(results, cell), *line])
    if not clean:
        return []
    header = [*SHARE_NAMES.values(), "accuracy"]
    sections = ["## Views and prompts"]
    if "results_views.png" in pictures:
        sections.append(_image("results_views.png", "Agreement of the views and accuracy of PPS on harder tests"))
    sections += ["Shares of the queries, in per cent:", _table(["family", "shots", "method", FROM, *header], clean)]
    if harder:
        sections += [f"{REFERENCE} on each test:", _table(["family", "shots", "test", FROM, *header], harder)]
    return sections


def _open_set_tables(results: Sequence[Record]) -> list[str]:
    """How well known and unknown queries are told apart: a table a family and number of shots."""
    own = [record for record in results if OPEN in record.tests]
    if not own:
        return []
    scores = list(
        dict.fromkeys(
            name.removeprefix("auroc/") for r in own for name in r.tests[OPEN].metrics if name.startswith("auroc/")
        )
    )
    header = ["method", FROM, "accuracy", "score", "AUROC on val, lead", *OPEN_SET.values()]
    header += [f"AUROC, {score}" for score in scores]
    sections = [
        "## Open set",
        f"The same test episodes with unknown queries besides ({own[0].tests[OPEN].options}): queries of classes that "
        "the episode does not have. The accuracy is that of the known queries. The score is the one that tells both "
        "kinds apart best on val, by the mean AUROC over the seeds, with its lead over the next score there; AUROC, "
        "OSCR and the false-positive rate at 95 % recall (FPR95, the lower the better) are by that score on test. In "
        "per cent, means over the seeds with their range; pooled over all episodes.",
    ]
    for part, family, n_shot in dict.fromkeys((r.part, r.family, r.n_shot) for r in own):
        rows = []
        for row in dict.fromkeys(r.row for r in own if (r.part, r.family, r.n_shot) == (part, family, n_shot)):
            cell = Cell(part, family, n_shot, row)
            chosen = if_measured(chosen_score, results, cell)
            rows.append(
                [
                    row,
                    _from(results, cell),
                    _shown(_accuracy, results, cell, OPEN),
                    chosen.name if chosen else NOTHING,
                    f"{_percent(chosen.auroc)}, {_percent(chosen.lead)}" if chosen else NOTHING,
                    *(
                        _shown(_metric, results, cell, OPEN, f"{kind}/{chosen.name}") if chosen else NOTHING
                        for kind in OPEN_SET
                    ),
                    *(_shown(_metric, results, cell, OPEN, f"auroc/{score}") for score in scores),
                ]
            )
        sections += [f"### Open set: `{family}`, {shots(n_shot)}", _table(header, rows)]
    return sections


def _twin_tables(results: Sequence[Record]) -> list[str]:
    """What clips of one recording on both sides of an episode do to the accuracy."""
    own = [record for record in results if TWINS in record.tests]
    if not own:
        return []
    rows = []
    for cell in dict.fromkeys(record.cell for record in own):
        for test in (TWINS, GROUPED):
            found = if_measured(between_tests, results, cell, test, GROUPED) if test != GROUPED else None
            told = {record.tests[test].options for record in own if record.cell == cell and test in record.tests}
            rows.append(
                [
                    f"`{cell.family}`",
                    str(cell.n_shot),
                    cell.row,
                    _from(results, cell),
                    test,
                    _shown(_accuracy, results, cell, test),
                    "" if test == GROUPED else NOTHING if found is None else _bold(found),
                    *(_shown(_metric, results, cell, test, name) for name in TWIN_METRICS),
                    ", ".join(f"`{options}`" for options in sorted(told) if options),
                ]
            )
    header = ["family", "shots", "method", FROM, "episodes", "accuracy", "Δ"]
    return [
        "## Twins",
        "A twin is a clip that was cut from the same recording as another. Each recording of the test has five clips, "
        "and episodes are dealt at random, or grouped, so that no query has a twin in the support. Δ is by how much "
        "random episodes are above grouped ones, which are others: the squares of both intervals are added, and where "
        "there are seeds that of their differences (Student's t). In per cent. [Both compared with one clip of each "
        "recording](motion_shapes.md#clips-of-one-recording-the-knob-twins).",
        _table([*header, *TWIN_METRICS.values(), "options"], rows),
    ]


def coverage_table(coverage: Sequence[Coverage]) -> list[str]:
    """How often sets of labels hold the truth: a heading, what is shown, and the table; nothing where nothing is."""
    if not coverage:
        return []
    header = ["family", "ways", "shots", "promised", "coverage", 'coverage of "none of these"', "labels in a set"]
    header += ["full sets", "empty sets", "false rejection", "at most"]
    rows = [
        [
            f"`{line.family}`",
            str(line.n_way),
            str(line.n_shot),
            _percent(1 - line.error),
            _within(line.coverage, line.interval),
            _within(line.unknown_coverage, line.unknown_interval),
            f"{line.set_size:.2f}",
            _percent(line.full_share),
            _percent(line.empty_share),
            _within(line.false_rejection, line.false_rejection_interval),
            _percent(line.error),
        ]
        for line in coverage
    ]
    draws = ", ".join(f"{n:,}" for n in sorted({line.draws for line in coverage}))
    commands = ", ".join(f"`{command}`" for command in dict.fromkeys(line.command for line in coverage))
    return [
        "## Sets with a promised rate",
        f'How often the set of labels of a query holds its class, or of an unknown query "none of these", over {draws} '
        "draws of the classes of calibration and test, with 95 % intervals over the draws; of these, how many labels a "
        'set has on average, how many have all or none, and how often a query of a known class gets "none of these" '
        f"alone. In per cent but for the labels. {commands}",
        _table(header, rows),
    ]


def _rate_tables(results: Sequence[Record], parts: Sequence[str]) -> list[str]:
    """Accuracy on val of each learning rate: a table a part, family and number of shots."""
    sections = []
    for part, family, n_shot in dict.fromkeys(
        (r.part, r.family, r.n_shot) for p in parts for r in results if r.part == p
    ):
        own = [r for r in results if (r.part, r.family, r.n_shot, r.purpose) == (part, family, n_shot, "choose")]
        rows = []
        for row in dict.fromkeys(record.row for record in own):
            cell = Cell(part, family, n_shot, row)
            tried, best = rates(results, cell), chosen_rate(results, cell)
            shown = [_percent(tried[lr]) if lr in tried else NOTHING for lr in _grid(own)]
            rows.append([row, *(f"**{t}**" if lr == best else t for lr, t in zip(_grid(own), shown, strict=True))])
        if rows:
            sections.append(f"`{family}`, {shots(n_shot)}, {PARTS[part]}:")
            sections.append(_table(["method", *(f"{lr:g}" for lr in _grid(own))], rows))
    title = [
        "## Learning rates",
        "Accuracy on val in per cent, over the second half of the validations; the chosen rate's is in bold, of equal "
        "ones the smaller's.",
    ]
    return [*title, *sections] if sections else []


def _commands(results: Sequence[Record], parts: Sequence[str], coverage: Sequence[Coverage]) -> list[str]:
    """A command a row, and the versions it was run with."""
    own = [record for part in parts for record in results if record.part == part and record.purpose == "measure"]
    first: dict[tuple[str, str], Cell] = {}
    for record in own:
        first.setdefault((record.part, record.row), record.cell)
    lines: list[str] = []
    folders: dict[str, str] = {}
    for cell in first.values():
        seed, record = next(iter(measured(results, cell).items()))
        trained = f", with the weights of {record.weights_of}" if record.weights_of is not None else ""
        lines.append(f"# {cell.row}, {PARTS[cell.part]}{trained}: {cell.family}, {shots(cell.n_shot)}, seed {seed}")
        if not record.test_command:
            lines.append(record.command)
            continue
        # A run folder holds one training; rows tested from the weights of another share it.
        known = record.command in folders
        folder = folders.setdefault(record.command, f"runs/study/{len(folders) + 1}")
        # A test refuses options of the model other than its checkpoint's: they are those of the run's own config.
        test = re.sub(r"--config \S+", f"--config {folder}/config.yaml", record.test_command)
        lines += [f"{c} --trainer.default_root_dir {folder}" for c in (record.command, test)[known:]]
    versions: dict[str, set[str]] = {}
    for line in [record.versions for record in results] + [record.versions for record in coverage]:
        for package, version in line.items():
            versions.setdefault(package, set()).add(version)
    said = ", ".join(f"{package} {' and '.join(sorted(found))}" for package, found in sorted(versions.items()))
    sections = ["## Commands and versions"] if lines or said else []
    if lines:
        sections += [
            "<details>\n<summary>One run of each method; the others differ in family, shots, learning rate and seed, "
            "harder tests in --data.knobs.overlap, outliers or noise, and further tests in the options that their "
            "tables name</summary>",
            "```sh\n# not run by the tests: needs hours\n" + "\n".join(lines) + "\n```",
            "</details>",
        ]
    return [*sections, f"Run with {said}."] if said else sections


def _grid(records: Sequence[Record]) -> list[float]:
    """The learning rates that were tried."""
    return sorted({record.lr for record in records if record.purpose == "choose" and record.lr is not None})


def _shown(text: Callable[..., str], *what: object) -> str:
    """A cell of a table: a text of it, or a dash where something was not measured."""
    shown = if_measured(text, *what)
    return NOTHING if shown is None else shown


def _from(results: Sequence[Record], *cells: Cell) -> str:
    """What a row's numbers come from: its head, its seeds, whose weights, and what was otherwise in training."""
    found = {seed: record for cell in cells for seed, record in measured(results, cell).items()}
    if not found:
        return NOTHING
    record = next(iter(found.values()))
    options = dict(re.findall(r"--(\S+) ('[^']*'|\S+)", record.command))
    said = [options.get("model.head", "m2df")]
    if record.repeats:
        said.append(f"seed{'s' if len(found) > 1 else ''} {', '.join(map(str, sorted(found)))}")
    else:
        said.append("not trained")
    if record.weights_of is not None:
        said.append(f"weights of {record.weights_of}")
    if "data.train_n_shot" in options:
        said.append(f"trained with {shots(int(options['data.train_n_shot']))}")
    return "; ".join(said)


def _accuracy(results: Sequence[Record], cell: Cell, test: str) -> str:
    found = accuracy(results, cell, test)
    return _within(found.mean, found.interval)


def _within(mean: float, interval: float) -> str:
    return f"{_percent(mean)} ± {_percent(interval)}"


def _metric(results: Sequence[Record], cell: Cell, test: str, name: str) -> str:
    """The mean over the seeds, and their range."""
    mean, lowest, highest = (_percent(value) for value in metric(results, cell, test, name))
    return mean if lowest == highest else f"{mean} ({lowest} to {highest})"


def _difference(found: Estimate) -> str:
    return f"{100 * found.mean:+z.1f} ± {_percent(found.interval)}".replace("-", "\N{MINUS SIGN}")


def _bold(found: Estimate) -> str:
    """A difference, in bold where it is established."""
    return f"**{_difference(found)}**" if found.established else _difference(found)


def _marked(results: Sequence[Record], cell: Cell, test: str) -> str:
    """The difference from the part's reference, in bold where it is established; nothing for that row itself."""
    return "" if cell.row == REFERENCES[cell.part] else _bold(difference(results, cell, test))


def _range(results: Sequence[Record], cell: Cell, test: str) -> str:
    found = accuracy(results, cell, test)
    return f"{_percent(found.lowest)} to {_percent(found.highest)}" if found.seeds > 1 else "one run"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _image(name: str, said: str) -> str:
    return f"![{said}](figures/{name})"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown; the columns are as wide as they need to be."""
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in (header, *rows)]
    return tabulate(escaped, headers="firstrow", tablefmt="github", disable_numparse=True)
