"""The shipped configs: parsed by the real command line, whole, and alike where they should be."""

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
import yaml

from clip_m2df import CLIPM2DF
from clip_m2df.commands.configs import find_config, shipped_configs
from clip_m2df.commands.trainer import CLI
from clip_m2df.episodes.datamodule import EpisodeDataModule
from clip_m2df.episodes.plan import EpisodeShape
from clip_m2df.nn.baselines import CLIPFSARHead, build_head

DATA_SETS = ("kinetics100", "ssv2", "ssv2_small", "hmdb51", "ucf101")
FAMILIES = ("scene", "order", "mixed")  # of the embedded benchmark
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


def differing(*tables: Mapping[str, Any]) -> set[str]:
    """The keys whose values are not the same in all of some configs."""
    return {path for path in set().union(*tables) if len({str(table.get(path)) for table in tables}) > 1}


def test_there_is_a_config_for_each_data_set_and_shot_and_no_settings_of_the_study() -> None:
    assert set(BASES) == {
        "demo_5way1shot.yaml",
        *(f"{name}_5way{shot}shot.yaml" for name, shot in itertools.product((*DATA_SETS, *FAMILIES), (1, 5))),
    }
    names = ("published", "clip_fsar", "clip_fsar_kinetics100", "gpu24gb", "laptop", "lora", "wandb_offline")
    assert set(RECIPES) == {f"recipes/{name}.yaml" for name in names}


# Recipes are for data sets, and for the demo as an example. All commands take the same options.
NAMES = [[base] for base in BASES]
NAMES += [[b, r] for b, r in itertools.product(BASES, RECIPES) if not b.startswith(FAMILIES)]
DEMO = [["demo_5way1shot.yaml", recipe] for recipe in RECIPES]


@pytest.mark.parametrize(
    ("names", "command"),
    [*itertools.product(NAMES, ["fit"]), *itertools.product(DEMO, ["validate", "test"])],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_no_key_is_ignored(names: list[str], command: str) -> None:
    config = parse(*names, command=command)
    expected: dict[str, Any] = {}
    for name in names:
        own = keys(name)
        if any(path.startswith("model.head_options.") for path in own):  # the later table replaces the former
            expected = {path: value for path, value in expected.items() if not path.startswith("model.head_options.")}
        expected |= own
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
    encoder: Any = head.transformer if isinstance(head, CLIPFSARHead) else head.views["local"].encoder
    width: int = encoder.layers[0].feed_forward[0].out_features
    return width


@pytest.mark.parametrize("name", DATA_SETS)
def test_the_files_of_one_data_set_differ_in_what_they_should(name: str) -> None:
    one, five = keys(f"{name}_5way1shot.yaml"), keys(f"{name}_5way5shot.yaml")
    assert one.keys() == five.keys()
    # Published for 1-shot on Kinetics alone: matching one way.
    single = {"model.head_options.single_direction"} if name == "kinetics100" else set()
    assert differing(one, five) == {"data.n_shot", "trainer.default_root_dir"} | single
    assert (one["data.n_shot"], five["data.n_shot"]) == (1, 5)
    assert found(parse(f"{name}_5way5shot.yaml"), "data.train_n_shot") is None
    for shot, config in ((1, one), (5, five)):
        assert config["trainer.default_root_dir"] == f"runs/{name}_5way{shot}shot"
        assert config["data.manifest"] == f"manifests/{name}.csv"


def test_the_families_differ_in_what_they_should() -> None:
    configs = {pair: keys(f"{pair[0]}_5way{pair[1]}shot.yaml") for pair in itertools.product(FAMILIES, (1, 5))}
    own = {"data.manifest", "data.n_shot", "data.train_n_shot", "trainer.default_root_dir"}
    assert differing(*configs.values()) == own
    for (name, shot), config in configs.items():
        assert config["data.manifest"] == f"motion_shapes_{name}"
        assert (config["data.n_shot"], config.get("data.train_n_shot", 1)) == (shot, 1)
        assert config["trainer.default_root_dir"] == f"runs/{name}_5way{shot}shot"


def test_the_data_sets_differ_in_their_recipe_alone() -> None:
    tables = [keys(f"{name}_5way5shot.yaml") for name in DATA_SETS]
    assert len({tuple(table) for table in tables}) == 1
    recipe = {f"model.{key}" for key in ("lr", "warmup_steps", "warmup_start", "milestones", "class_weight")}
    run = {"data.manifest", "data.flip", "data.validate_every", "trainer.max_steps", "trainer.default_root_dir"}
    assert differing(*tables) == recipe | run


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
    expected = {"frames": 8, "resize": None, "size": None, "n_query": 5, "n_query_eval": 1, "test_episodes": 10000}
    assert {key: config[f"data.{key}"] for key in expected} == expected
    data = EpisodeDataModule(**parse(f"{name}_5way{shot}shot.yaml").data.as_dict())
    assert (data.reader.resize, data.reader.size) == (256, 224)  # of a ViT-B/16


def dropped(model: CLIPM2DF) -> list[float]:
    """The shares that the dropouts of the head drop in training."""
    return sorted(module.p for module in model.model.head.modules() if isinstance(module, torch.nn.Dropout))


@pytest.mark.parametrize(("name", "shot"), list(itertools.product(DATA_SETS, (1, 5))))
def test_clip_fsars_recipe_is_exact(name: str, shot: int) -> None:
    peak, start, warmup, (tenth, hundredth), end, weight = TUNED[name]
    layers = ["recipes/clip_fsar.yaml", *["recipes/clip_fsar_kinetics100.yaml"][: name == "kinetics100"]]
    config = parse(f"{name}_5way{shot}shot.yaml", *layers)
    assert config.trainer.max_steps == end / 4
    assert (config.model.head, config.model.head_options) == ("clip_fsar", {"single_direction": False})
    assert (config.model.class_weight, config.model.match_weight) == (weight, 1.0)
    data = EpisodeDataModule(**config.data.as_dict())
    assert (data.train_shape, data.eval_shape) == (EpisodeShape(5, 1, 5), EpisodeShape(5, shot, 1))
    assert (data.reader.flip, data.reader.sampling) == (False, "window" if warmup == 250 else "random_segments")
    assert (data.evaluation, data.jitter_queries) == (("bank", True) if warmup == 250 else ("direct", False))
    assert data.reader.resize_mode == "squash"
    assert (data.reader.frames, data.reader.resize, data.reader.size) == (8, 256, 224)
    options = {"hidden_dim": 8}
    model = CLIPM2DF(**config.model.as_dict() | {"backbone": "tiny", "head_options": options})
    assert dropped(model) == [0.05, 0.05, 0.2]
    made: Any = model.configure_optimizers()
    for group, factor in zip(made["optimizer"].param_groups, made["lr_scheduler"]["scheduler"].lr_lambdas, strict=True):
        for step in range(config.trainer.max_steps):
            iteration = 4 * step + 3  # the rate is set in each of 4, and the step made at that of the last
            rate = peak * (1e-2 if iteration >= hundredth else 0.1 if iteration >= tenth else 1)
            if iteration < warmup:
                rate = start + (peak - start) * iteration / warmup
            assert group["initial_lr"] * factor(step) == pytest.approx(rate, rel=1e-12), step


@pytest.mark.parametrize(("name", "shot"), list(itertools.product(DATA_SETS, (1, 5))))
def test_clip_m2dfs_recipe_is_exact(name: str, shot: int) -> None:
    config = parse(f"{name}_5way{shot}shot.yaml", "recipes/published.yaml")
    single = name == "kinetics100" and shot == 1
    assert (config.model.head, config.model.head_options) == ("m2df", {"single_direction": single})
    data = EpisodeDataModule(**config.data.as_dict())
    assert (data.train_shape, data.eval_shape) == (EpisodeShape(5, shot, 5), EpisodeShape(5, shot, 1))
    assert (data.reader.flip, data.reader.sampling, data.reader.resize_mode) == (True, "linspace", "short_side")
    assert (data.reader.frames, data.reader.resize, data.reader.size) == (8, 256, 224)
    assert config.model.selection == "sample"
    model = CLIPM2DF(**config.model.as_dict() | {"backbone": "tiny", "head_options": {"hidden_dim": 8}})
    # Of two encoders, and of the three blocks of the global view.
    assert dropped(model) == [*4 * [0.05], *3 * [0.1], *2 * [0.2]]
    made: Any = model.configure_optimizers()
    assert {group["weight_decay"] for group in made["optimizer"].param_groups} == {0}
    factors = made["lr_scheduler"]["scheduler"].lr_lambdas
    assert {1e-6} == {1e-6 * factor(step) for factor in factors for step in range(config.trainer.max_steps)}
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    assert model.model.backbone.normalise(images).unique().tolist() == [0, 1]


@pytest.mark.parametrize("name", [name for name in BASES if name.startswith(DATA_SETS)])
def test_head_comments_name_the_commands(name: str) -> None:
    text = find_config(name).read_text(encoding="utf-8")
    head = text[: text.index("seed_everything")]
    data_set = name.partition("_5way")[0]
    prepared = re.search(rf"clip-m2df prepare {data_set} --root (\w+)", head)
    assert prepared
    for command, more in (("fit", ""), ("test", " --ckpt_path best")):
        assert f"clip-m2df {command} --config {name} --data.root {prepared[1]}{more}\n" in head
