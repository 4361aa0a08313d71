"""The shipped configs: parsed by the real command line, whole, and alike where they should be."""

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import yaml

from clip_m2df.commands.configs import find_config, shipped_configs
from clip_m2df.commands.trainer import CLI
from clip_m2df.episodes.datamodule import EpisodeDataModule
from clip_m2df.errors import UserError
from clip_m2df.nn.baselines import build_head

DATA_SETS = ("kinetics100", "ssv2", "ssv2_small", "hmdb51", "ucf101")
FAMILIES = ("scene", "order")  # of the embedded benchmark
BASES = sorted(name for name in shipped_configs() if not name.startswith("recipes/"))
RECIPES = sorted(name for name in shipped_configs() if name.startswith("recipes/"))


class Parsed(CLI):
    """Parses and goes no further."""

    def before_instantiate_classes(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass

    def after_instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def parse(*names: str, command: str = "fit") -> Any:
    return Parsed([command, *(f"--config={find_config(name)}" for name in names)]).config[command]


def keys(name: str) -> dict[str, Any]:
    """Every key of a config, by its path."""
    return dict(_leaves(yaml.safe_load(find_config(name).read_text(encoding="utf-8"))))


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def found(config: Any, path: str) -> Any:
    for key in path.split("."):
        config = config[key]
    return config


def test_there_is_a_config_for_each_data_set_and_shot() -> None:
    assert set(BASES) == {
        "demo_5way1shot.yaml",
        *(f"{name}_5way{shot}shot.yaml" for name, shot in itertools.product((*DATA_SETS, *FAMILIES), (1, 5))),
    }
    assert set(RECIPES) == {f"recipes/{name}.yaml" for name in ("published", "gpu24gb", "laptop", "wandb_offline")}


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
@pytest.mark.parametrize(
    ("base", "recipe"),
    # Recipes are for data sets, and for the demo as an example.
    [(b, r) for b, r in itertools.product(BASES, [None, *RECIPES]) if r is None or not b.startswith(FAMILIES)],
)
def test_no_key_is_ignored(base: str, recipe: str | None, command: str) -> None:
    names = [base] if recipe is None else [base, recipe]
    config = parse(*names, command=command)
    expected: dict[str, Any] = {}
    for name in names:
        expected |= keys(name)
    for path, value in expected.items():
        got = found(config, path)
        # A class is given by its name and becomes a path.
        assert got == value or (path.endswith("class_path") and got.endswith(f".{value}")), path
    # Each option is one that takes effect, and in its range.
    data = EpisodeDataModule(**config.data.as_dict())
    assert data.eval_shape.n_shot == expected["data.n_shot"]
    head = build_head(config.model.head, {"dim": 64, **config.model.head_options})
    taken = {"single_direction": head.single_direction, "hidden_dim": _hidden_dim(head)}
    assert {option: taken[option] for option in config.model.head_options} == config.model.head_options


def _hidden_dim(head: Any) -> int:
    width: int = head.views["local"].encoder.layers[0].feed_forward[0].out_features
    return width


@pytest.mark.parametrize("name", DATA_SETS)
def test_the_files_of_one_data_set_differ_in_what_they_should(name: str) -> None:
    one, five = keys(f"{name}_5way1shot.yaml"), keys(f"{name}_5way5shot.yaml")
    assert one.keys() == five.keys()
    differing = {path for path in one if one[path] != five[path]}
    # Published for 1-shot on Kinetics alone: matching one way.
    single = {"model.head_options.single_direction"} if name == "kinetics100" else set()
    assert differing == {"data.n_shot", "trainer.default_root_dir"} | single
    assert (one["data.n_shot"], five["data.n_shot"]) == (1, 5)
    assert found(parse(f"{name}_5way5shot.yaml"), "data.train_n_shot") is None
    for shot, config in ((1, one), (5, five)):
        assert config["trainer.default_root_dir"] == f"runs/{name}_5way{shot}shot"
        assert config["data.manifest"] == f"manifests/{name}.csv"


def test_the_families_differ_in_what_they_should() -> None:
    configs = {pair: keys(f"{pair[0]}_5way{pair[1]}shot.yaml") for pair in itertools.product(FAMILIES, (1, 5))}
    paths = set().union(*configs.values())
    differing = {path for path in paths if len({str(config.get(path)) for config in configs.values()}) > 1}
    assert differing == {"data.manifest", "data.n_shot", "data.train_n_shot", "trainer.default_root_dir"}
    for (name, shot), config in configs.items():
        assert config["data.manifest"] == f"motion_shapes_{name}"
        assert (config["data.n_shot"], config.get("data.train_n_shot", 1)) == (shot, 1)
        assert config["trainer.default_root_dir"] == f"runs/{name}_5way{shot}shot"


def test_settings_of_the_study_are_no_configs_of_a_run() -> None:
    assert not [name for name in shipped_configs() if name.startswith(("study/", "sweeps/"))]
    with pytest.raises(UserError, match="none of that name comes with the package"):
        find_config("study/full.yaml")


def test_the_data_sets_differ_in_their_recipe_alone() -> None:
    tables = [keys(f"{name}_5way5shot.yaml") for name in DATA_SETS]
    assert len({tuple(table) for table in tables}) == 1
    differing = {path for path in tables[0] if len({str(table[path]) for table in tables}) > 1}
    recipe = {f"model.{key}" for key in ("lr", "warmup_steps", "warmup_start", "milestones", "class_weight")}
    run = {"data.manifest", "data.flip", "data.validate_every", "trainer.max_steps", "trainer.default_root_dir"}
    assert differing == recipe | run


# CLIP-FSAR's effective recipe, in its iterations of 4 episodes: peak, start, warm-up, tenths, end, loss weight.
TUNED = {
    "hmdb51": (1e-5, 1e-6, 700, [1400, 2100], 5000, 1.2),
    "kinetics100": (1e-5, 5e-6, 250, [750, 1250], 5000, 1.5),
    "ssv2": (5e-5, 1e-5, 4000, [8000, 12000], 30000, 3.0),
    "ssv2_small": (5e-5, 2e-5, 2000, [4000, 6000], 30000, 3.0),
    "ucf101": (2e-6, 1e-7, 600, [1200, 1800], 3000, 1.5),
}


@pytest.mark.parametrize(("name", "shot"), list(itertools.product(DATA_SETS, (1, 5))))
def test_the_tuned_recipe_is_in_them(name: str, shot: int) -> None:
    peak, start, warmup, tenths, end, weight = TUNED[name]
    config = keys(f"{name}_5way{shot}shot.yaml")
    assert config["model.lr"] == peak
    assert config["model.lr"] * config["model.warmup_start"] == pytest.approx(start)
    steps = [config["model.warmup_steps"], *config["model.milestones"], config["trainer.max_steps"]]
    # An optimiser step takes 16 episodes, four iterations.
    for ours, theirs in zip(steps, [warmup, *tenths, end], strict=True):
        assert abs(ours - theirs / 4) <= 0.5
    assert config["data.episodes_per_step"] == 16
    assert config["model.weight_decay"] == 1e-3
    assert config["model.class_weight"] == weight
    assert config["data.flip"] is (not name.startswith("ssv2"))
    expected = {"frames": 8, "resize": 256, "size": 224, "n_query": 5, "n_query_eval": 1, "test_episodes": 10000}
    assert {key: config[f"data.{key}"] for key in expected} == expected


@pytest.mark.parametrize("name", [name for name in BASES if name.startswith(DATA_SETS)])
def test_head_comments_say_how_what_and_what_is_known(name: str) -> None:
    text = find_config(name).read_text(encoding="utf-8")
    head = text[: text.index("seed_everything")]
    data_set = name.partition("_5way")[0]
    prepared = re.search(rf"clip-m2df prepare {data_set} --root (\w+)", head)
    assert prepared
    for words in (
        f"clip-m2df fit --config {name} --data.root {prepared[1]}\n",
        f"clip-m2df test --config {name} --data.root {prepared[1]} --ckpt_path best\n",
        "classes in train / val / test",
        "TS-FSAR",
        "CLIP-M²DF: not measured here yet",
    ):
        assert words in head
    assert max(map(len, text.splitlines())) <= 120
