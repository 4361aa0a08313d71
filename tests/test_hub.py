"""Models as folders and on the hub: the same numbers again, nothing run, damage and strangers told."""

import contextlib
import inspect
import io
import json
import os
import re
import shutil
import stat
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor

from clip_m2df import CLIPM2DF, FewShotClassifier, UserError
from clip_m2df.cli import main
from clip_m2df.files import locked_folder, sha256_of
from clip_m2df.hub import MODEL_FORMAT
from clip_m2df.training.module import RUN_OPTIONS
from tests.conftest import files_up_to
from tests.project.test_trust import FORMS, pickled
from tests.training.test_module import make_episodes

PLAIN = {"hidden_dim": 32, "num_heads": 4, "depth": 2}
READING: dict[str, Any] = {"frames": 4, "resize": 40}
# Since there are several ways.
READING_SO = READING | {"resize_mode": "squash", "sampling": "linspace"}


def make(tiny_clip_dir: Path, **options: Any) -> CLIPM2DF:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"head_options": PLAIN, "template": ["a photo of {}", "{} in a video"], "lr": 1.5e-5}
    model = CLIPM2DF(backbone=str(tiny_clip_dir), **(defaults | options))
    model.reading = dict(READING)
    return model.eval()


def logits(model: CLIPM2DF) -> Tensor:
    with torch.no_grad():
        scored: Tensor = model(make_episodes(1)).logits
    return scored


@pytest.fixture(scope="module")
def saved(tiny_clip_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    make(tiny_clip_dir).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of a saved model, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def change(folder: Path, **values: Any) -> None:
    """Change what config.json says."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def change_options(folder: Path, **values: Any) -> None:
    change(folder, options=json.loads((folder / "config.json").read_text())["options"] | values)


def write_weights(folder: Path, weights: dict[str, Tensor]) -> None:
    """Other weights, with their checksum."""
    save_file(weights, folder / "model.safetensors")
    change(folder, sha256=sha256_of(folder / "model.safetensors"))


# There and back


def test_a_saved_model_gives_the_same_numbers(
    tiny_clip_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = Path(shutil.copytree(tiny_clip_dir, tmp_path / "clip"))
    model = make(copied, selection="sample", text_fusion=0.25, milestones=[3, 5], backbone_lr=1e-7)
    with torch.no_grad():  # as if it had been trained
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    assert model.save_pretrained(tmp_path / "deep" / "folder") is None
    shutil.rmtree(copied)  # neither the tower's folder nor a network is needed
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for asking in ("snapshot_download", "hf_hub_download"):
        failing(monkeypatch, AssertionError("a folder needs no network"), huggingface_hub, asking)
    loaded = CLIPM2DF.from_pretrained(tmp_path / "deep" / "folder", selection="sample")
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(loaded.encode_prompts(["never heard of"]), model.encode_prompts(["never heard of"]))
    # Of a path others have its last part alone.
    assert dict(loaded.hparams) == {**model.hparams, "backbone": "clip"}
    assert loaded.model.backbone.description() == {**model.model.backbone.description(), "source": "clip"}
    assert str(tmp_path) not in (tmp_path / "deep" / "folder" / "config.json").read_text(encoding="utf-8")
    assert loaded.reading == READING
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    # What is of a run alone stays out, as of checkpoints.
    options = json.loads((tmp_path / "deep" / "folder" / "config.json").read_text())["options"]
    assert set(options) == {*model.hparams}
    assert not set(options) & set(RUN_OPTIONS)
    assert loaded.text_fusion == 0
    # What was loaded can be saved.
    loaded.save_pretrained(tmp_path / "again")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "deep" / "folder" / file).read_bytes()


def test_nothing_else_lies_in_the_folder(saved: Path) -> None:
    assert {path.name for path in saved.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    config = json.loads((saved / "config.json").read_text())
    assert config["format"] == MODEL_FORMAT
    assert config["options"]["template"] == ["a photo of {}", "{} in a video"]
    # Whoever may read one of them may read them all.
    assert len({stat.S_IMODE(path.stat().st_mode) for path in saved.iterdir()}) == 1


def test_shared_and_strided_weights_are_saved(tiny_clip_dir: Path, tmp_path: Path) -> None:
    model = make(tiny_clip_dir)
    views: Any = model.model.head.views
    first, second, third = (
        views[v].encoder.layers[i].feed_forward[3].weight for v, i in (("local", 0), ("local", 1), ("global", 0))
    )
    first.data = torch.randn(first.shape[::-1], generator=torch.Generator().manual_seed(3)).t()
    third.data = second.data
    assert not first.is_contiguous()
    assert third.data_ptr() == second.data_ptr()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(CLIPM2DF.from_pretrained(tmp_path)), logits(model))


def test_options_win_over_the_saved_ones(saved: Path) -> None:
    loaded = CLIPM2DF.from_pretrained(saved, lr=0.5, text_fusion=0.5, selection="expectation", freeze_backbone=True)
    assert (loaded.lr, loaded.text_fusion) == (0.5, 0.5)
    assert loaded.model.head.selection == "expectation"
    assert loaded.model.freeze_backbone
    assert loaded.hparams["lr"] == 0.5
    assert list(loaded.model.templates) == ["a photo of {}", "{} in a video"]
    wrong: list[tuple[dict[str, Any], str]] = [
        (
            {"selektion": "sample"},
            r"CLIPM2DF has no option 'selektion'; its options are adapters, backbone, .*warmup_steps",
        ),
        ({"head_options": PLAIN | {"depth": 3}}, r"no model can be made of .*: not a checkpoint .*missing model\.head"),
        ({"lr": -1.0}, r"no model can be made of .*: lr is -1"),
    ]
    for options, message in wrong:
        with pytest.raises(UserError, match=message):
            CLIPM2DF.from_pretrained(saved, **options)


# Damage


def test_a_flipped_bit_does_not_go_unnoticed(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for bit, place in enumerate((start, start + 1001, len(whole) // 2, len(whole) - 1)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bit
        weights.write_bytes(damaged)
        load_file(weights)  # which sees nothing
        with pytest.raises(UserError, match=r"model\.safetensors is damaged, or was not saved with .* sha256 is"):
            CLIPM2DF.from_pretrained(folder)
    weights.write_bytes(whole)
    CLIPM2DF.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("", r"config\.json is damaged \(.*\): give a folder that save_pretrained wrote"),
        ("[" * 100_000, r"config\.json is damaged"),
        ("[]", r"config\.json is of another model"),
        ('{"model_type": "clip"}', r"of another model or version: its format is None, not 'clip-m2df model 1'"),
        ('{"format": "clip-m2df model 2"}', r"its format is 'clip-m2df model 2'"),
        (json.dumps({"format": MODEL_FORMAT}), r"config\.json is damaged, its reading"),
        ({"options": []}, "has no options"),
        ({"options": {"head": "m2df"}}, "has no options with head and backbone"),
        ({"options": {"head": "m2df", "backbone": "tiny"}}, "has no options with head and backbone"),
        ({"options": {"head": 3, "backbone": {}}}, "has no options with head and backbone"),
        ({"options": {"head": "m2df", "backbone": {}}}, r"no model can be made of .*model: .* has no visual_config"),
        ({"reading": 3}, r"config\.json is damaged, its reading"),
        ({"reading": {}}, "its reading"),
        ({"reading": {"frames": 4, "resize": -1}}, "its reading"),
        ({"reading": {"frames": 4, "resize": "256"}}, "its reading"),
        ({"reading": {"frames": 4, "resize": 256, "crop": 1}}, "its reading"),
        ({"reading": {"frames": 4, "resize": 256, "sampling": "window"}}, "its reading"),
        ({"reading": READING_SO | {"sampling": "all"}}, "its reading"),
        ({"reading": READING_SO | {"resize_mode": 3}}, "its reading"),
        ({"reading": READING_SO | {"resize_mode": ["squash"]}}, "its reading"),
        ({"sha256": None}, r"model\.safetensors is damaged, .*, not None; fetch both anew"),
        ({"sha256": "0" * 64}, f"not {'0' * 64}; fetch both anew"),
    ],
)
def test_files_that_are_no_config(folder: Path, changed: str | dict[str, Any], message: str) -> None:
    if isinstance(changed, str):
        (folder / "config.json").write_text(changed)
    else:
        change(folder, **changed)
    with pytest.raises(UserError, match=message) as caught:
        CLIPM2DF.from_pretrained(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_file_that_is_missing(folder: Path, file: str) -> None:
    (folder / file).unlink()
    with pytest.raises(UserError, match=rf"cannot read .*{file} \(No such file or directory\): give a folder that"):
        CLIPM2DF.from_pretrained(folder)


def test_weights_of_another_model(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = "model.head.scale"
    others = {key: weight for key, weight in weights.items() if key != name}
    for changed, message in (
        (others, f"missing {name}"),
        (weights | {"more": torch.ones(1)}, "unknown more"),
        (others | {name: torch.ones(7)}, rf"{name} is \(7,\), expected"),
    ):
        write_weights(folder, changed)
        with pytest.raises(UserError, match=rf"made of {folder}: not a checkpoint of this model: {message}"):
            CLIPM2DF.from_pretrained(folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged, or was not saved"):
        CLIPM2DF.from_pretrained(folder)
    change(folder, sha256=sha256_of(folder / "model.safetensors"))  # whoever saved it had half a file already
    with pytest.raises(UserError, match=r"model\.safetensors is damaged, or no safetensors file"):
        CLIPM2DF.from_pretrained(folder)


# Strangers


@pytest.mark.parametrize("form", FORMS)
def test_a_pickle_is_not_obeyed(folder: Path, form: str) -> None:
    marker = folder / "obeyed"
    (folder / "model.safetensors").write_bytes(pickled(marker, form))
    change(folder, sha256=sha256_of(folder / "model.safetensors"))
    with pytest.raises(UserError, match=r"model\.safetensors is damaged, or no safetensors file"):
        CLIPM2DF.from_pretrained(folder)
    assert not marker.exists()


def test_a_head_of_strangers_is_not_imported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = folder / "imported"
    code = f"import os\nos.mkdir({str(marker)!r})\nfrom clip_m2df.nn.m2df import M2DFHead as Head\n"
    (folder / "head_of_a_stranger.py").write_text(code)
    monkeypatch.syspath_prepend(str(folder))
    head = "head_of_a_stranger.Head"
    change_options(folder, head=head)
    asked: list[dict[str, Any]] = [{}, {"head": "otam"}]
    for options in asked:
        with pytest.raises(UserError, match=rf"{folder} takes the head '{head}', code that is not this package's"):
            CLIPM2DF.from_pretrained(folder, **options)
    assert not marker.exists()
    # Whoever names it gets it.
    loaded = CLIPM2DF.from_pretrained(folder, head=head)
    assert marker.exists()
    assert type(loaded.model.head).__name__ == "M2DFHead"
    assert sys.modules.pop("head_of_a_stranger")


@pytest.mark.parametrize("option", ["_instantiator", "device", "args"])
def test_options_that_the_model_has_not(folder: Path, option: str) -> None:
    change_options(folder, **{option: "os.system"})
    with pytest.raises(UserError, match=rf"{folder} has the option '{option}', which CLIPM2DF has not"):
        CLIPM2DF.from_pretrained(folder)


# The hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the hub: what is pushed lies there by its name, and is found there."""
    root = tmp_path / "hub"

    class Address(str):
        repo_id: str

    def create_repo(self: HfApi, repo_id: str, **options: Any) -> Address:
        address = Address(f"https://hub/{repo_id}")
        address.repo_id = repo_id if "/" in repo_id else f"somebody/{repo_id}"
        (root / address.repo_id).mkdir(parents=True, exist_ok=True)
        return address

    def upload_folder(self: HfApi, *, repo_id: str, folder_path: Path, **options: Any) -> str:
        shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)
        return f"https://hub/{repo_id}/commit/1"

    def snapshot_download(repo_id: str, *, allow_patterns: list[str], **options: Any) -> str:
        assert set(options) == {"force_download", "token", "cache_dir", "local_files_only", "revision"}
        if not (root / repo_id).is_dir():
            raise FileNotFoundError(repo_id)
        ignore = shutil.ignore_patterns("README.md")
        files = ["config.json", "model.safetensors", "adapter_model.safetensors", "calibration.safetensors"]
        assert allow_patterns == files
        return str(shutil.copytree(root / repo_id, tmp_path / "cache", ignore=ignore, dirs_exist_ok=True))

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return root


@pytest.mark.parametrize("name", ["somebody/few-shot", "few-shot"])
def test_there_and_back_by_the_hub(name: str, hub: Path, tiny_clip_dir: Path) -> None:
    model = make(tiny_clip_dir)
    measured = {"UCF101 test, 5-way 1-shot": "90.1 ± 0.4"}
    assert model.push_to_hub(name, measured=measured) == "https://hub/somebody/few-shot/commit/1"
    card = (hub / "somebody" / "few-shot" / "README.md").read_text()
    assert 'FewShotClassifier.from_checkpoint("somebody/few-shot")' in card
    assert "| UCF101 test, 5-way 1-shot | 90.1 ± 0.4 |" in card
    loaded = CLIPM2DF.from_pretrained("somebody/few-shot")
    assert torch.equal(logits(loaded), logits(model))
    # The checksum holds for what comes from the hub too.
    weights = hub / "somebody" / "few-shot" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(UserError, match=r"sha256 .*from the hub: force_download=True"):
        CLIPM2DF.from_pretrained("somebody/few-shot")


def test_saved_and_pushed_at_once(hub: Path, tiny_clip_dir: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"push_to_hub": True, "repo_id": "somebody/else"}
    url = make(tiny_clip_dir).save_pretrained(tmp_path / "model", measured={"a": "1"}, **options)
    assert url == "https://hub/somebody/else/commit/1"
    pushed, kept = (path / "README.md" for path in (hub / "somebody" / "else", tmp_path / "model"))
    assert '"somebody/else"' in pushed.read_text()
    assert '"user/name"' in kept.read_text()
    assert all("| a | 1 |" in card.read_text() for card in (pushed, kept))


def failing(
    monkeypatch: pytest.MonkeyPatch, error: Exception, place: Any = huggingface_hub, name: str = "snapshot_download"
) -> None:
    def fail(*args: Any, **options: Any) -> str:
        raise error

    monkeypatch.setattr(place, name, fail)


def test_what_the_hub_has_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    # The client's own check of names comes first.
    for name in ("/nowhere/model", "./model", "~/.model", "a/b/c"):
        with pytest.raises(UserError, match=r"is neither a folder here nor a model of the hub that you may see"):
            CLIPM2DF.from_pretrained(name)
    with pytest.raises(UserError, match=r"'somebody/model' is no folder here, and .* can't be fetched: connect once"):
        CLIPM2DF.from_pretrained("somebody/model", cache_dir=tmp_path)

    response: Any = type("Response", (), {"headers": {}, "status_code": 404, "request": None})()
    for error, message in (
        (RepositoryNotFoundError("404", response=response), "is neither a folder here nor a model of the hub"),
        (RevisionNotFoundError("404", response=response), "'somebody/model' has no revision 'v2'"),
        (RuntimeError("whatever the network came up with"), "can't be fetched: connect once, or download config"),
    ):
        failing(monkeypatch, error)
        with pytest.raises(UserError, match=message):
            CLIPM2DF.from_pretrained("somebody/model", revision="v2")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_model_of_the_hub_that_is_not_whole(file: str, hub: Path, saved: Path) -> None:
    (hub / "a").mkdir(parents=True)
    shutil.copytree(saved, hub / "a" / "b")
    (hub / "a" / "b" / file).unlink()
    with pytest.raises(UserError, match=rf"cannot read .*{file} .*, or fetch the model anew"):
        CLIPM2DF.from_pretrained("a/b")


def test_a_hub_that_refuses(tiny_clip_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, ConnectionError("no route"), HfApi, "create_repo")
    with pytest.raises(UserError, match="'me/model' can't be made on the hub: no route; check name, network, and hf"):
        make(tiny_clip_dir).push_to_hub("me/model")


# Writing


def test_folders_that_cannot_be_written(tiny_clip_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    model = make(tiny_clip_dir)
    with pytest.raises(UserError, match=r"cannot save the model in .*file: File exists; make room, or give another"):
        model.save_pretrained(tmp_path / "file")
    model.hparams["head_options"] = {"hidden_dim": torch.tensor(32)}
    with pytest.raises(UserError, match="options can't be saved as JSON: Object of type Tensor"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / "config.json").exists()


def test_a_card_is_kept_and_figures_are_not_lost(tiny_clip_dir: Path, tmp_path: Path) -> None:
    model = make(tiny_clip_dir)
    model.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nmy own words")
    model.save_pretrained(tmp_path)
    assert "my own words" in (tmp_path / "README.md").read_text()
    for options in ({"measured": {"a": "1"}}, {"model_card_kwargs": {"measured": {"a": "1"}}}):
        with pytest.raises(UserError, match=r"README\.md is there already and is kept.*: remove it, or write"):
            model.save_pretrained(tmp_path, **options)


# The card


def test_the_card_says_what_the_model_is(saved: Path, tiny_clip_dir: Path, tmp_path: Path) -> None:
    card = ModelCard.load(saved / "README.md")
    assert card.data.to_dict()["library_name"] == "clip-m2df"
    assert card.data.pipeline_tag == "video-classification"
    assert card.data.license == "apache-2.0"
    assert {"few-shot-learning", "action-recognition", "clip"} <= set(card.data.tags)
    text = card.text
    assert "| head | `m2df` with hidden_dim 32, num_heads 4, depth 2 |" in text
    assert f"| tower | `{tiny_clip_dir.name}`: ViT, 32 x 32 pixels, embeddings of 32 |" in text
    assert str(tiny_clip_dir) not in text  # the author's folders
    assert "| prompt | `a photo of {}`, `{} in a video` |" in text
    assert "| 4 frames, one from each of as many equal segments; short side scaled to 40 pixels; crop of 32 x 32" in (
        text.replace("| videos ", "")
    )
    assert 'FewShotClassifier.from_checkpoint("user/name")' in text
    assert "Nothing was measured when this card was written." in text
    assert "±" not in text

    model = make(tiny_clip_dir, head="otam", head_options=None, freeze_backbone=True, template="{} | {{}}\n---")
    model.reading = None
    model.model.backbone.source = "openai/clip-vit-base-patch16"
    model.save_pretrained(tmp_path, measured={"a | b\nc": "1.5 ± 0.1"})
    text = ModelCard.load(tmp_path / "README.md").text
    assert "| head | `otam` |" in text
    assert "| tower | `openai/clip-vit-base-patch16`: ViT, 32 x 32 pixels, embeddings of 32, frozen |" in text
    assert r"| prompt | `{} \| {{}} ---` |" in text
    assert "| videos | not recorded" in text
    assert "Nothing was measured" not in text
    assert CLIPM2DF.from_pretrained(tmp_path).reading is None
    assert text.endswith("| | accuracy in % |\n|---|---|\n| a \\| b c | 1.5 ± 0.1 |\n")


def test_a_model_says_how_its_videos_were_read(tiny_clip_dir: Path, tmp_path: Path) -> None:
    model = make(tiny_clip_dir)
    model.reading = dict(READING_SO)
    model.save_pretrained(tmp_path)
    assert CLIPM2DF.from_pretrained(tmp_path).reading == READING_SO
    text = ModelCard.load(tmp_path / "README.md").text
    assert "4 frames, chosen by the sampling linspace; both sides scaled to 40 pixels; crop of 32 x 32" in text


# Beside the command line


def test_the_commands_show_the_models_options_once_and_none_of_the_hubs() -> None:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit):
        main(["fit", "--help"])
    options = re.findall(r"^ +--model\.(\w+)", said.getvalue(), re.MULTILINE)
    assert sorted(options) == sorted(inspect.signature(CLIPM2DF).parameters)


# What is given in the place of a model


def test_the_name_of_a_checkpoint_in_its_run_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("best", "last", "best.ckpt", "last.ckpt"):
        for load in (CLIPM2DF.from_pretrained, FewShotClassifier.from_checkpoint):
            with pytest.raises(
                UserError, match=f"'{name}' is what fit and test call .*, RUN/checkpoints/{name[:4]}.ckpt"
            ):
                load(name)
    for run in ("runs/demo", "other", "."):
        (tmp_path / run / "checkpoints").mkdir(parents=True)
        (tmp_path / run / "checkpoints" / "best.ckpt").touch()
    for load in (CLIPM2DF.from_pretrained, FewShotClassifier.from_checkpoint):
        with pytest.raises(
            UserError, match=r"checkpoints/best.ckpt, other/checkpoints/best.ckpt, runs/demo/checkpoints/best.ckpt here"
        ):
            load("best")
        for folder in ("runs", "runs/demo", "runs/demo/checkpoints"):
            with pytest.raises(UserError, match=r"of a run and not a model: give .*, runs/demo/checkpoints/best.ckpt"):
                load(folder)
    with pytest.raises(UserError, match=r"there is no checkpoint runs/best.ckpt"):
        FewShotClassifier.from_checkpoint("runs/best.ckpt")


def test_what_is_neither_a_folder_nor_a_checkpoint_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "weights.txt").write_text("")
    os.mkfifo(tmp_path / "fifo")
    for name in (tmp_path / "fifo", Path(os.devnull)):
        for load in (CLIPM2DF.from_pretrained, FewShotClassifier.from_checkpoint):
            with pytest.raises(UserError, match=f"{name} is no folder of a model, and no file of a checkpoint"):
                load(str(name))
    with pytest.raises(UserError, match=r"weights.txt is no folder of a model, and no file of a checkpoint"):
        CLIPM2DF.from_pretrained(tmp_path / "weights.txt")


@pytest.mark.parametrize("name", ["ViT-B/16", "vit_b_16", "openai/clip-vit-base-patch16", "CLIP-ViT-B/16"])
def test_the_name_of_clip_is_no_trained_model(name: str) -> None:
    for load in (CLIPM2DF.from_pretrained, FewShotClassifier.from_checkpoint):
        with pytest.raises(
            UserError, match=r"CLIP's own and not a trained model.* backbone=, 'openai/clip-vit-base-patch16'"
        ):
            load(name)


def test_a_folder_of_clip_is_no_trained_model(tiny_clip_dir: Path) -> None:
    with pytest.raises(UserError, match=r"CLIP's own weights are given as --backbone, or backbone="):
        CLIPM2DF.from_pretrained(tiny_clip_dir)


def test_one_process_at_a_time_writes_a_model(tiny_clip_dir: Path, tmp_path: Path) -> None:
    model = make(tiny_clip_dir)
    with locked_folder(tmp_path / "model", "model"):
        with pytest.raises(UserError, match=r"another process writes the model .*model: wait"):
            model.save_pretrained(tmp_path / "model")
        model.save_pretrained(tmp_path / "other")
    assert {path.name for path in (tmp_path / "other").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    model.save_pretrained(tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"config.json", "model.safetensors", "README.md"}


@pytest.mark.parametrize("size", [10, 2000, 100_000])
def test_on_a_full_disk_the_model_that_was_there_stays(size: int, folder: Path, tiny_clip_dir: Path) -> None:
    (folder / "README.md").unlink()  # the card is written anew
    files = {path: path.read_bytes() for path in folder.iterdir()}
    other = make(tiny_clip_dir)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.1)
    message = rf"{re.escape(str(folder))}.*make room"
    with files_up_to(size), pytest.raises(UserError, match=message):
        other.save_pretrained(folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == files


def test_no_link_is_followed(tiny_clip_dir: Path, tmp_path: Path) -> None:
    folder, precious = tmp_path / "model", tmp_path / "precious"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        precious.with_suffix(f".{name}").write_text("precious")
        (folder / name).symlink_to(precious.with_suffix(f".{name}"))
    (folder / "README.md").symlink_to(tmp_path / "nowhere.md")
    make(tiny_clip_dir).save_pretrained(folder)
    assert {path.read_text() for path in tmp_path.glob("precious.*")} == {"precious"}
    assert not (tmp_path / "nowhere.md").exists()
    CLIPM2DF.from_pretrained(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs there")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_fifo_is_not_waited_for(name: str, folder: Path) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match=f"the model's file .*{name} is not a regular file"):
        CLIPM2DF.from_pretrained(folder)
