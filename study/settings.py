"""What is run: the settings of a study, and the options that a run of it takes."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from clip_m2df.commands.configs import find_config
from clip_m2df.errors import UserError
from clip_m2df.nn.baselines import head_class
from study.results import CLEAN, PARTS, TESTS

Options = Mapping[str, Any]
# What options of a test that turn a knob of the benchmark begin with.
KNOB = "data.knobs."
# The model's options that a test may choose for itself.
OF_TESTS = ("model.selection", "model.text_fusion")


@dataclass(frozen=True)
class Row:
    """A line of a table: a head and how it is trained, or another row's weights tested otherwise.

    Attributes:
        options: of ``clip-m2df fit``, where they differ from the config's; ``--model.lr`` as ``model.lr``.
        weights_of: the row whose weights are tested, with the options.
        tower_rate: the tower's learning rate, as a share of the head's.
        families: those that it is run on, if not on all of its part.
    """

    options: Options = field(default_factory=dict)
    weights_of: str = ""
    tower_rate: float = 1.0
    families: tuple[str, ...] = ()


@dataclass(frozen=True)
class FurtherTest:
    """A further test.

    Attributes:
        options: of ``clip-m2df test``, on top of those of the row.
        rows: that are tested so, if not all of the part.
    """

    options: Options
    rows: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """Rows that share their learning rates and options.

    Attributes:
        families: of the embedded benchmark.
        n_shots: support videos a class in the tests. Trained and validated is with the config of the first number.
        learning_rates: the grid from which each row's is chosen on val, for each family.
        options: of ``clip-m2df fit``, for all rows.
        rows: by name.
        knobs: by knob, the levels at which ``knob_rows`` are tested too.
        knob_rows: see ``knobs``.
        further: tests beside the clean one and those with knobs, by name.
    """

    families: tuple[str, ...]
    n_shots: tuple[int, ...]
    learning_rates: tuple[float, ...]
    options: Options
    rows: Mapping[str, Row]
    knobs: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    knob_rows: tuple[str, ...] = ()
    further: Mapping[str, FurtherTest] = field(default_factory=dict)

    def trains(self, row: str) -> bool:
        """Whether there is anything to train: the head, or the tower below it."""
        options = {**self.options, **self.rows[row].options}
        head = head_class(options.get("model.head", "m2df"))
        return getattr(head, "trained", True) or not options.get("model.freeze_backbone", True)

    def tests(self, row: str) -> dict[str, Options]:
        """The options of each test of a row, by the test's name."""
        tests: dict[str, Options] = {CLEAN: {}}
        if row in self.knob_rows:
            tests |= {
                f"{knob}={level}": {f"{KNOB}{knob}": level} for knob, levels in self.knobs.items() for level in levels
            }
        return tests | {name: test.options for name, test in self.further.items() if row in (test.rows or self.rows)}

    def own(self, family: str) -> list[str]:
        """The rows that are run on a family with weights of their own, or without any."""
        return [name for name, row in self.rows.items() if not row.weights_of and family in (row.families or [family])]

    def tested_from(self, row: str, family: str) -> dict[str, Options]:
        """The rows that are tested on a family from the weights of another, with their options."""
        return {
            name: other.options
            for name, other in self.rows.items()
            if other.weights_of == row and family in (other.families or [family])
        }


@dataclass(frozen=True)
class Settings:
    """A study.

    Attributes:
        seeds: of weights and training episodes, one run each.
        choosing_seed: the seed of the runs by which learning rates are chosen.
        parts: ``main`` (frozen tower), ``heads`` (the same, with further heads, prompts and tests), ``tower`` (trained
            too) and ``adapters`` (both compared with LoRA).
    """

    seeds: tuple[int, ...]
    choosing_seed: int
    parts: Mapping[str, Part]

    def count(self) -> int:
        """How many runs there are."""
        rows = [(p, name) for p in self.parts.values() for family in p.families for name in p.own(family)]
        return sum(len(p.learning_rates) + len(self.seeds) if p.trains(name) else 1 for p, name in rows)

    @classmethod
    def read(cls, path: Path) -> Settings:
        """Read a YAML file such as ``configs/study/full.yaml``.

        Raises:
            UserError: it can't be read, or holds something else.
        """
        try:
            text = yaml.safe_load(path.read_text(encoding="utf-8"))
            parts = {name: _part(part) for name, part in text["parts"].items()}
            if "main" not in parts or parts.keys() - PARTS:
                raise ValueError(f"parts are {', '.join(PARTS)}, and main there must be")
            return cls(tuple(text["seeds"]), text["choosing_seed"], parts)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
            raise UserError(f"study settings {path}: {error!r}; start from configs/study/full.yaml") from error


def _part(part: dict[str, Any]) -> Part:
    rows = {}
    for name, options in part["rows"].items():
        options = dict(options or {})
        weights_of, tower_rate = options.pop("weights_of", ""), float(options.pop("tower_rate", 1))
        families = tuple(options.pop("families", ()))
        rows[name] = Row(options, weights_of, tower_rate, families)
    further = {}
    for name, options in part.get("tests", {}).items():
        options = dict(options)
        tested = tuple(options.pop("rows", ()))
        further[name] = FurtherTest(options, tested)
    strangers = {row.weights_of for row in rows.values()} | set(part.get("knob_rows", ()))
    own = {name for name, row in rows.items() if not row.weights_of}
    if unknown := strangers - {"", *own}:
        raise ValueError(f"no row with weights of its own is called {sorted(unknown)}")
    if unknown := {row for test in further.values() for row in test.rows} - rows.keys():
        raise ValueError(f"no row is called {sorted(unknown)}")
    if unknown := further.keys() - set(TESTS):
        raise ValueError(f"no test is called {sorted(unknown)}; there are {', '.join(TESTS)}")
    if unknown := {family for row in rows.values() for family in row.families} - set(part["families"]):
        raise ValueError(f"no family of the part is called {sorted(unknown)}")
    if len(set(part["learning_rates"])) < len(part["learning_rates"]):
        raise ValueError("a learning rate is there twice")
    return Part(
        tuple(part["families"]),
        tuple(part["n_shots"]),
        tuple(float(rate) for rate in part["learning_rates"]),
        part.get("options", {}),
        rows,
        {knob: tuple(levels) for knob, levels in part.get("knobs", {}).items()},
        tuple(part.get("knob_rows", ())),
        further,
    )


@dataclass(frozen=True)
class Run:
    """One training with its tests, or the tests of a head that has nothing to train.

    Attributes:
        part: of the study.
        purpose: ``choose`` (a learning rate, on val) or ``measure`` (on test).
        family: of the benchmark.
        row: its name.
        seed: of weights and training episodes.
        lr: learning rate of the head; None where nothing is trained.
    """

    part: str
    purpose: str
    family: str
    row: str
    seed: int
    lr: float | None

    def options(self, settings: Settings) -> dict[str, Any]:
        """All options of ``clip-m2df fit`` where they differ from the config's."""
        part = settings.parts[self.part]
        row = part.rows[self.row]
        rates = {} if self.lr is None else {"model.lr": self.lr}
        if self.lr is not None and row.tower_rate != 1:
            rates["model.backbone_lr"] = float(f"{self.lr * row.tower_rate:g}")
        seeds = {"seed_everything": self.seed, "data.seed": self.seed}
        return {**part.options, **row.options, **rates, **seeds}

    def command(self, settings: Settings, n_shot: int) -> str:
        """What repeats the training, or where nothing is trained the clean test."""
        verb = "fit" if settings.parts[self.part].trains(self.row) else "test"
        return _command(verb, config_name(self.family, n_shot), self.options(settings))

    def test_command(self, settings: Settings, n_shot: int, row: str) -> str:
        """What repeats a row's clean test after the training; empty where nothing is trained or tested."""
        if self.purpose == "choose" or not settings.parts[self.part].trains(self.row):
            return ""
        # The checkpoint knows the model's options, but those that are a test's.
        given = self.options(settings)
        own = {name: value for name, value in given.items() if name in OF_TESTS or not name.startswith("model.")}
        options = {"ckpt_path": "last", **own, **self.rows(settings)[row]}
        return _command("test", config_name(self.family, n_shot), options)

    def training(self, settings: Settings) -> str:
        """A digest of all that the weights depend on, but the versions."""
        name = config_name(self.family, settings.parts[self.part].n_shots[0])
        return _digest([yaml.safe_load(find_config(name).read_text(encoding="utf-8")), self.options(settings)])

    def rows(self, settings: Settings) -> dict[str, Options]:
        """The rows that get a record, with the options of their tests: its own, and those tested from its weights."""
        if self.purpose == "choose":
            return {self.row: {}}
        return {self.row: {}, **settings.parts[self.part].tested_from(self.row, self.family)}

    def tested(self, settings: Settings) -> list[tuple[int, str]]:
        """Number of shots and row of each record."""
        n_shots = settings.parts[self.part].n_shots
        kept = n_shots if self.purpose == "measure" else n_shots[:1]
        return list(itertools.product(kept, self.rows(settings)))

    def tests(self, settings: Settings, row: str) -> dict[str, Options]:
        """The options of each test of a row, by the test's name; a rate is chosen without any."""
        return settings.parts[self.part].tests(row) if self.purpose == "measure" else {}

    def digest(self, settings: Settings) -> str:
        """Of all that the records depend on, but the versions: those with another one are of other settings."""
        rows = self.rows(settings)
        tests = [[row, rows[row], _of_tests(self.tests(settings, row))] for row in rows]
        return _digest([self.training(settings), self.tested(settings), tests])


def config_name(family: str, n_shot: int) -> str:
    """The shipped config of a family and a number of shots."""
    return f"{family}_5way{n_shot}shot.yaml"


def knobs_of(options: Options) -> dict[str, float]:
    """The knobs of the benchmark among the options of a test, by their own names."""
    return {name.removeprefix(KNOB): level for name, level in options.items() if name.startswith(KNOB)}


def told(options: Options) -> str:
    """Options as they are given on the command line."""
    return " ".join(f"--{name} {_shown(value)}" for name, value in options.items())


def _of_tests(tests: Mapping[str, Options]) -> dict[str, Options]:
    # Results have been recorded under the knobs' own names.
    return {test: {name.removeprefix(KNOB): value for name, value in given.items()} for test, given in tests.items()}


def _command(verb: str, config: str, options: Options) -> str:
    return " ".join(("clip-m2df", verb, "--config", config, told(options)))


def _digest(content: Any) -> str:
    # Results have been recorded under the option's former name.
    content = json.loads(json.dumps(content).replace('train_augmentations"', 'train_views"'))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _shown(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, bool | list | dict) else str(value)
    return f"'{text}'" if any(letter in text for letter in ' []{}"') else text
