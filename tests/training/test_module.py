import copy
import inspect
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from clip_m2df import CLIPM2DF, Episode, M2DFHead, UserError
from clip_m2df.clip.backbone import CLIPBackbone
from clip_m2df.episode import select_episodes
from clip_m2df.nn.baselines import HEADS, head_class
from clip_m2df.nn.class_text import class_text_logits, query_class_logits
from clip_m2df.nn.prompts import ensemble
from clip_m2df.training.checkpoints import read_checkpoint
from clip_m2df.training.module import RUN_OPTIONS
from tests.conftest import quiet_trainer as trainer
from tests.conftest import read_golden, save_checkpoint

PLAIN = {"hidden_dim": 32, "num_heads": 4, "context_dropout": 0.0, "attention_dropout": 0.0, "dropout": 0.0}
NAMES = ["a cat", "a car", "a tree", "the sea"]


def make(tiny_clip_dir: Path, head_options: dict[str, Any] | None = None, **options: Any) -> CLIPM2DF:
    torch.manual_seed(0)
    known = inspect.signature(head_class(options.get("head", "m2df"))).parameters
    sizes = {name: value for name, value in PLAIN.items() if name in known}
    sizes |= {"frames": 4} if options.get("head") == "ts_fsar" else {}
    return CLIPM2DF(backbone=str(tiny_clip_dir), head_options=sizes | (head_options or {}), **options)


def make_episodes(n: int, seed: int = 0) -> Episode:
    """Noise around one picture a class, so that there is something to learn: 3-way 1-shot, 2 queries a class."""
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.rand(4, 1, 3, 32, 32, generator=torch.Generator().manual_seed(99)) * 200
    classes = torch.stack([torch.randperm(4, generator=generator)[:3] for _ in range(n)])
    labels = torch.arange(3).repeat_interleave(2).expand(n, 6)

    def videos(of: Tensor) -> Tensor:
        noise = torch.rand(*of.shape, 4, 3, 32, 32, generator=generator) * 55
        return (pictures[of] + noise).to(torch.uint8)

    return Episode(
        support=videos(classes.unsqueeze(-1)),
        query=videos(classes.gather(1, labels)),
        query_labels=labels,
        class_indices=classes,
        class_names=NAMES,
        draws=torch.rand(n, 6, generator=generator),
    )


class UsersEpisodes(IterableDataset[Episode]):
    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[Episode]:
        return (make_episodes(2, seed) for seed in range(self.n))


class UsersData(lightning.LightningDataModule):
    """Somebody's own data module, which knows no more than the legend of Episode."""

    def train_dataloader(self) -> DataLoader[Episode]:
        return DataLoader(UsersEpisodes(40), batch_size=None)

    def val_dataloader(self) -> DataLoader[Episode]:
        return DataLoader(UsersEpisodes(4), batch_size=None)

    test_dataloader = val_dataloader


def test_it_trains_in_a_users_own_script_with_their_own_data(tiny_clip_dir: Path, tmp_path: Path) -> None:
    model = make(tiny_clip_dir, lr=1e-3)
    (before,) = trainer(tmp_path).validate(model, UsersData(), verbose=False)
    fitted = trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2)
    fitted.fit(model, UsersData())
    assert fitted.global_step == 20
    (after,) = trainer(tmp_path).validate(model, UsersData(), verbose=False)
    assert after["val/loss/match"] < 0.5 * before["val/loss/match"]
    assert set(after) == {
        "val/accuracy", "val/interval", "val/pps_accuracy", "val/local_accuracy",
        "val/global_accuracy", "val/view_agreement", "val/local_to_global",
        "val/global_to_local", "val/loss/total", "val/loss/match", "val/loss/distill",
    }  # fmt: skip


@pytest.mark.parametrize("loss_reduction", ["sum", "mean"])
@pytest.mark.parametrize("class_weight", [0.0, 1.5])
@pytest.mark.parametrize("head", HEADS)
def test_the_loss_is_the_methods_sum(tiny_clip_dir: Path, head: str, class_weight: float, loss_reduction: str) -> None:
    own = {"direction": "mutual"} if head == "m2df" else {}
    weights = {"match_weight": 0.7, "distill_weight": 3.0, "class_weight": class_weight}
    model = make(tiny_clip_dir, own, head=head, loss_reduction=loss_reduction, **weights)
    queries, videos = (6, 9) if loss_reduction == "mean" else (1, 1)
    batch = make_episodes(2)
    loss = model.training_step(batch, 0)
    if head_class(head).differentiable:
        loss.backward()
        assert without_gradient(model) == []
    table = model.encode_prompts(NAMES)
    expected = 0.0
    for i in range(2):
        support, query = (model.model.encode_frames(clips[i]) for clips in (batch["support"], batch["query"]))
        classes, labels = batch["class_indices"][i], batch["query_labels"][i]
        output = model.model.head(support, query, table[classes], batch["draws"][i])
        expected += 0.7 * F.cross_entropy(output.logits, labels, reduction="sum").item() / queries
        expected += 3.0 * output.distillation_loss.item()
        of_support, of_query = class_text_logits(model.model.head, support, query, table[classes], table)
        expected += class_weight * F.cross_entropy(of_support[:, 0], classes, reduction="sum").item() / videos
        expected += class_weight * F.cross_entropy(of_query, classes[labels], reduction="sum").item() / videos
    assert loss.item() == pytest.approx(expected / 2, rel=1e-5)


def without_gradient(model: CLIPM2DF) -> list[str]:
    """What is trained and was not reached, for which DDP would wait."""
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_accumulated_episodes_make_the_step_of_a_batch(tiny_clip_dir: Path, tmp_path: Path) -> None:
    batch = make_episodes(4)
    states = []
    for batches in ([batch], [select_episodes(batch, torch.tensor([i])) for i in range(4)]):
        model = make(tiny_clip_dir).double()
        loader: Any = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
        options: dict[str, Any] = {"accumulate_grad_batches": len(batches), "max_steps": 1, "precision": "64-true"}
        trainer(tmp_path, limit_val_batches=0, **options).fit(model, loader)
        states.append(model.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize("freeze_backbone", [True, False])
def test_what_is_trained_and_at_which_rate(tiny_clip_dir: Path, tmp_path: Path, freeze_backbone: bool) -> None:
    model = make(tiny_clip_dir, lr=1e-2, backbone_lr=1e-4, freeze_backbone=freeze_backbone)
    before = copy.deepcopy(model.state_dict())
    loader: Any = DataLoader(UsersEpisodes(1), batch_size=None)
    trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(model, loader)
    # Adam's first step is as long as the learning rate wherever there is a gradient.
    moved = {name: (value - before[name]).abs().max().item() for name, value in model.state_dict().items()}
    for name, distance in moved.items():
        if name.startswith("model.head.views."):
            assert distance == pytest.approx(1e-2, rel=0.05), name
        elif name.startswith("model.backbone.visual.") and not freeze_backbone and "position_ids" not in name:
            assert distance <= 1.05e-4
        else:
            assert distance == 0, name
    visual = [distance for name, distance in moved.items() if name.startswith("model.backbone.visual.")]
    assert max(visual) == (0 if freeze_backbone else pytest.approx(1e-4, rel=0.05))


@pytest.mark.parametrize("options", [{"views": ["global"]}, {"pps": False}])
def test_nothing_that_is_trained_is_without_gradient(tiny_clip_dir: Path, options: dict[str, Any]) -> None:
    model = make(tiny_clip_dir, options)
    model.training_step(make_episodes(2), 0).backward()
    assert without_gradient(model) == []


def test_the_learning_rate_warms_up_and_steps_by_optimiser_steps(tiny_clip_dir: Path, tmp_path: Path) -> None:
    schedule: dict[str, Any] = {"warmup_steps": 4, "warmup_start": 0.2, "milestones": [6, 8], "gamma": 0.1}
    model = make(tiny_clip_dir, lr=1.0e-3, backbone_lr=1e-4, **schedule)
    seen = []

    class Watch(lightning.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            seen.append([group["lr"] for group in optimizer.param_groups])

    loader: Any = DataLoader(UsersEpisodes(20), batch_size=None)
    options: dict[str, Any] = {"max_steps": 10, "accumulate_grad_batches": 2, "limit_val_batches": 0}
    trainer(tmp_path, callbacks=[Watch()], **options).fit(model, loader)
    factors = [0.2, 0.4, 0.6, 0.8, 1, 1, 0.1, 0.1, 0.01, 0.01]
    assert [head for head, _ in seen] == pytest.approx([1e-3 * f for f in factors])
    assert [tower for _, tower in seen] == pytest.approx([1e-4 * f for f in factors])
    ahead: Any = make(tiny_clip_dir, **schedule, warmup_offset=0.75).configure_optimizers()
    factors[:4] = [0.35, 0.55, 0.75, 0.95]
    assert [ahead["lr_scheduler"]["scheduler"].lr_lambdas[0](k) for k in range(10)] == pytest.approx(factors)


@pytest.mark.parametrize("tower", ["clip_resnet", "clip_vit"])
def test_no_decay_exempts_what_clip_fsar_exempts(tower: str) -> None:
    state = read_golden(tower)[1]
    backbone = CLIPBackbone.from_openai(state, head_width=64, activation="quick_gelu").description()
    choice = {"weight_decay": 1e-3, "no_decay": [".bn", ".norm."]}
    model = CLIPM2DF(backbone=backbone, head="clip_fsar", class_weight=1.0, **choice)  # type: ignore[arg-type]
    groups: Any = model.configure_optimizers()
    exempt, decaying = (
        [group for group in groups["optimizer"].param_groups if group["weight_decay"] == decay] for decay in (0, 1e-3)
    )
    # Its rule goes by the names that parameters have there, in the tower OpenAI's: in a ViT's none has either part.
    names = [name for name in state if name.startswith("visual.") and not name.endswith(("_var", "_mean", "_tracked"))]
    wanted = sorted(tuple(state[name].shape) for name in names if "bn" in name or "norm" in name)
    assert len(wanted) == {"clip_resnet": 36, "clip_vit": 0}[tower]
    of_head = [tuple(p.shape) for g in exempt if g["name"].startswith("head") for p in g["params"]]
    assert of_head == [(32,), (32,)]  # its layer norm
    assert sorted(tuple(p.shape) for g in exempt if g["name"].startswith("backbone") for p in g["params"]) == wanted
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for g in exempt + decaying for p in g["params"]} == trained


def test_no_decay_that_names_nothing_is_told(tiny_clip_dir: Path) -> None:
    with pytest.warns(UserWarning, match=r"no_decay: no parameter's name has \.nrom or \.bn"):
        make(tiny_clip_dir, no_decay=[".nrom", ".bn"]).configure_optimizers()


@pytest.mark.parametrize(
    "changed",
    [{"loss_reduction": "mean"}, {"no_decay": [".norm."]}, {"warmup_offset": 0.75}],
    ids=lambda c: next(iter(c)),
)
def test_a_run_of_a_version_without_an_option_goes_on_without_it(
    tiny_clip_dir: Path, tmp_path: Path, changed: dict[str, Any]
) -> None:
    _, path = fitted_checkpoint(tiny_clip_dir, tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    for name in changed:
        del checkpoint["hyper_parameters"][name]
    torch.save(checkpoint, path)
    loader: Any = DataLoader(UsersEpisodes(4), batch_size=None)
    run = trainer(tmp_path, max_steps=3, limit_val_batches=0)
    with pytest.raises(UserError, match=rf"model\.{next(iter(changed))} is .*, but .* in the run that is to go on"):
        run.fit(make(tiny_clip_dir, lr=1e-3, **changed), loader, ckpt_path=path)
    run.fit(make(tiny_clip_dir, lr=1e-3), loader, ckpt_path=path)
    assert run.global_step == 3


def test_batch_norm_that_moves_sees_support_and_queries_apart_whatever_the_batch() -> None:
    state = read_golden("clip_resnet")[1]
    backbone = CLIPBackbone.from_openai(state, head_width=64, activation="quick_gelu").description()
    clips = torch.randint(0, 256, (2, 9, 2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    apart, together = (CLIPM2DF(backbone=backbone, head="otam", freeze_batch_norm=False).model for _ in range(2))
    together.load_state_dict(apart.state_dict())
    expected = [apart.encode_frames(part) for episode in clips for part in (episode[:3], episode[3:])]
    batch: Any = {
        "support": clips[:, :3].unflatten(1, (3, 1)),
        "query": clips[:, 3:],
        "same": torch.arange(18).view(2, 9),
    }
    support, query = together.encode_episode(batch)
    torch.testing.assert_close(support.squeeze(2), torch.stack(expected[::2]))
    torch.testing.assert_close(query, torch.stack(expected[1::2]))
    for name, value in apart.state_dict().items():
        torch.testing.assert_close(together.state_dict()[name], value, msg=name)
    together.eval()
    before = together.encode_episode(batch)[1]
    torch.testing.assert_close(before, together.encode_frames(batch["query"]))


@pytest.mark.parametrize("head", ["m2df", "clip_fsar"])
@torch.no_grad()
def test_text_fusion_mixes_the_texts_probabilities_in(tiny_clip_dir: Path, head: str) -> None:
    batch, model = make_episodes(3), make(tiny_clip_dir, head=head, text_fusion=0.9).eval()
    torch.nn.init.constant_(model.model.head.scale, 20.0)
    fused = model.validation_step(batch, 0)
    table = model.encode_prompts(NAMES)
    for i in range(3):
        prompts = table[batch["class_indices"][i]]
        query = model.model.encode_frames(batch["query"][i])
        text = query_class_logits(model.model.head, query, prompts, prompts).softmax(-1)
        probabilities = text**0.9 * fused.output.logits[i].softmax(-1) ** 0.1
        assert torch.equal(fused.scores[i].argmax(-1), probabilities.argmax(-1))
    assert not torch.equal(fused.scores.argmax(-1), fused.output.logits.argmax(-1))
    # The same videos as unknown queries have the same scores, the text's part included.
    unknown: Any = {"unknown": batch["query"], "unknown_draws": batch["draws"]}
    alike = model.validation_step(batch | unknown, 0)
    assert alike.unknown is not None
    torch.testing.assert_close(alike.unknown, fused.scores)
    model.text_fusion = 0.0
    plain = model.validation_step(batch, 0)
    assert torch.equal(plain.scores.argmax(-1), plain.output.logits.argmax(-1))


def fitted_checkpoint(tiny_clip_dir: Path, folder: Path, **options: Any) -> tuple[CLIPM2DF, Path]:
    model = make(tiny_clip_dir, lr=1e-3, **options)
    run = trainer(folder, max_steps=2, limit_val_batches=0)
    run.fit(model, DataLoader(UsersEpisodes(2), batch_size=None))
    run.save_checkpoint(folder / "model.ckpt")
    return model.eval(), folder / "model.ckpt"


def test_a_checkpoint_is_enough(tiny_clip_dir: Path, tmp_path: Path) -> None:
    copied = tmp_path / "clip"
    shutil.copytree(tiny_clip_dir, copied)
    options = {"template": "this is {}", "head_options": {"depth": 2}, "selection": "sample"}
    model, path = fitted_checkpoint(copied, tmp_path, **options)
    shutil.rmtree(copied)  # neither the folder nor a network is needed
    loaded = CLIPM2DF.load_from_checkpoint(path).eval()
    new_names = ["something it has never heard of", "a cat"]
    assert torch.equal(loaded.encode_prompts(new_names), model.encode_prompts(new_names))
    assert isinstance(model.model.head, M2DFHead)
    model.model.head.selection = "argmax"
    with torch.no_grad():
        assert torch.equal(loaded(make_episodes(2)).logits, model(make_episodes(2)).logits)
    # The checkpoint of a loaded model is enough too.
    assert loaded.hparams["backbone"] == str(copied)
    loaded.eval()
    trainer(tmp_path).validate(loaded, UsersData(), verbose=False)


def test_a_checkpoint_has_the_tower_that_backbone_options_made(tiny_clip_dir: Path, tmp_path: Path) -> None:
    said = {"mean": [0, 0, 0], "std": [1, 1, 1]}
    path = save_checkpoint(make(tiny_clip_dir, backbone_options=said), tmp_path / "model.ckpt")
    tower = CLIPM2DF.load_from_checkpoint(path).model.backbone
    assert torch.equal(tower.normalise(torch.full((3, 2, 2), 0.25)), torch.full((3, 2, 2), 0.25))
    with pytest.raises(UserError, match="backbone_options are of weights that are loaded; a checkpoint has its towers"):
        CLIPM2DF.load_from_checkpoint(path, backbone_options=said)
    with pytest.raises(UserError, match=r"model\.ckpt is a training's checkpoint, no CLIP's weights"):
        CLIPM2DF(backbone=str(path))


def test_what_changes_at_evaluation_stays_out_of_the_checkpoint(tiny_clip_dir: Path, tmp_path: Path) -> None:
    _, path = fitted_checkpoint(tiny_clip_dir, tmp_path, selection="sample", text_fusion=0.5)
    saved = read_checkpoint(path)["hyper_parameters"]
    # All the others are in it: one forgotten there would come back at its default.
    assert set(saved) == set(inspect.signature(CLIPM2DF).parameters) - set(RUN_OPTIONS)
    loaded = CLIPM2DF.load_from_checkpoint(path)
    assert loaded.model.head.selection == "argmax"
    assert loaded.text_fusion == 0
    assert CLIPM2DF.load_from_checkpoint(path, selection="expectation").model.head.selection == "expectation"
    with pytest.raises(UserError, match="CLIPM2DF has no option 'selektion'"):
        CLIPM2DF.load_from_checkpoint(path, selektion="sample")


def test_templates_make_an_ensemble_which_a_checkpoint_keeps(tiny_clip_dir: Path, tmp_path: Path) -> None:
    templates = ["a photo of {}", "{} in a video"]
    model, path = fitted_checkpoint(tiny_clip_dir, tmp_path, template=templates)
    single = [make(tiny_clip_dir, template=template).encode_prompts(NAMES) for template in templates]
    torch.testing.assert_close(model.encode_prompts(NAMES), ensemble(torch.stack(single)))
    again = CLIPM2DF.load_from_checkpoint(path)
    assert again.hparams["template"] == templates
    assert torch.equal(again.encode_prompts(NAMES), model.encode_prompts(NAMES))


def test_a_clip_that_episodes_share_is_encoded_once_with_the_gradients_of_both(tiny_clip_dir: Path) -> None:
    batch = make_episodes(2)
    batch["query"][1, 3] = batch["support"][0, 2, 0]
    same = torch.arange(18).view(2, 9)
    same[1, 3 + 3] = 2
    losses, gradients, frames = [], [], []
    for shared in (False, True):
        model = make(tiny_clip_dir, head_options={"train_selection": "argmax"})
        model.model.backbone.visual.register_forward_hook(lambda _, inputs, __: frames.append(len(inputs[0])))
        # Trainer and metrics aside: the loss of the batch.
        loss = model.training_step(Episode(**{**batch, "same": same}) if shared else batch, 0)
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad for p in model.model.backbone.visual.parameters()])
    assert sum(frames[:-1]) == 18 * 4
    assert frames[-1] == 17 * 4
    torch.testing.assert_close(losses[0], losses[1])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [None, {"r": 2, "target": ["q", "fc1"]}])
def test_compiled_parts_give_the_same_loss_and_gradients(adapters: Any, tiny_clip_dir: Path) -> None:
    batch = make_episodes(2)
    losses, gradients = [], []
    for compiled in (False, True):
        options = {"class_weight": 1.0, "adapters": adapters, "compile": compiled}
        model = make(tiny_clip_dir, head_options={"train_selection": "argmax"}, **options)
        for name, weight in model.named_parameters():
            if "lora_B" in name:  # zero at first
                torch.nn.init.constant_(weight, 0.1)
        loss = model.training_step(batch, 0)
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(losses[0], losses[1])
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_checkpoints_of_something_else_are_refused(tiny_clip_dir: Path, tmp_path: Path) -> None:
    _, path = fitted_checkpoint(tiny_clip_dir, tmp_path)
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    torch.save({"state_dict": {}, "hyper_parameters": {"backbone": "resnet", "head": 3}}, tmp_path / "other.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["hyper_parameters"]["head_options"] = PLAIN | {"depth": 2}
    torch.save(checkpoint, tmp_path / "deeper.ckpt")
    for name, message in (
        ("none", r"checkpoint .*none.ckpt: no such file"),
        ("text", r"text.ckpt is damaged or no checkpoint"),
        ("other", r"other.ckpt is damaged or of another model"),
        ("deeper", r"not a checkpoint of this model: missing model\.head\.views\.local\.encoder\.layers\.1"),
    ):
        with pytest.raises(UserError, match=message):
            CLIPM2DF.load_from_checkpoint(tmp_path / f"{name}.ckpt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr is 0.0; it must be above 0"),
        ({"backbone_lr": -1.0}, "backbone_lr is -1.0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0; it must be at least 0"),
        ({"no_decay": ".bn"}, r"no_decay is '\.bn'; it must be a list of parts of names"),
        ({"no_decay": [""]}, r"no_decay is \[''\]; it must be a list"),
        ({"no_decay": [3]}, r"no_decay is \[3\]; it must be a list"),
        ({"loss_reduction": "max"}, "loss_reduction: there is no 'max'; there are sum, mean"),
        ({"warmup_offset": -0.5}, "warmup_offset is -0.5; it must be at least 0"),
        ({"head_options": {"dim": 16}}, "dim follows from the backbone; leave it out"),
        ({"head_options": {"views": None}}, "head_options: M2DFHead does not take"),
        ({"text_fusion": 1.5}, "text_fusion is 1.5"),
        ({"warmup_start": 0.0}, "warmup_start is 0.0"),
        ({"head_options": {"selection": "sample"}}, r"selection is an option of the model itself, --model\.selection"),
        ({"template": "a photo"}, r"'a photo' has no \{\}"),
    ],
)
def test_options_out_of_range_are_refused_by_name(tiny_clip_dir: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(tiny_clip_dir, **options)


def test_the_prompt_table_is_kept_until_other_weights_come(tiny_clip_dir: Path) -> None:
    model = make(tiny_clip_dir)
    table = model.encode_prompts(NAMES)
    assert model.encode_prompts(list(NAMES)) is table
    assert not table.requires_grad
    state = model.state_dict()
    state = {k: v + 0.1 if "text.model.text_projection" in k else v for k, v in state.items()}
    model.load_state_dict(state)
    assert not torch.allclose(model.encode_prompts(NAMES), table)
    with torch.inference_mode():
        under_inference = make(tiny_clip_dir).encode_prompts(NAMES)
    assert not under_inference.is_inference()


@pytest.mark.parametrize("freeze_backbone", [True, False])
@pytest.mark.parametrize("freeze_batch_norm", [True, False])
def test_what_is_frozen_is_in_eval_mode_from_the_start(
    tiny_clip_dir: Path, tmp_path: Path, freeze_backbone: bool, freeze_batch_norm: bool
) -> None:
    torch.save(read_golden("clip_resnet")[1], tmp_path / "resnet.pt")
    (tmp_path / "open_clip_config.json").write_text('{"quick_gelu": true, "vision_cfg": {}, "text_cfg": {"heads": 1}}')
    options = {"freeze_backbone": freeze_backbone, "freeze_batch_norm": freeze_batch_norm}
    made = CLIPM2DF(backbone=str(tmp_path / "resnet.pt"), head_options=PLAIN, **options)  # type: ignore[arg-type]
    description = made.model.backbone.description()
    rebuilt = CLIPM2DF(backbone=description, head_options=PLAIN, **options)  # type: ignore[arg-type]
    for model in (made, rebuilt):
        assert model.model.head.training
        assert model.model.backbone.visual.training is not freeze_backbone
        assert model.model.backbone.text is not None
        assert not model.model.backbone.text.training
        norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert {norm.training for norm in norms} == {not freeze_backbone and not freeze_batch_norm}
        before = copy.deepcopy(norms[0].running_mean)
        model.model.encode_frames(torch.full((2, 3, 64, 64), 200, dtype=torch.uint8))
        assert torch.equal(before, norms[0].running_mean) is (freeze_backbone or freeze_batch_norm)  # type: ignore[arg-type]


def test_a_head_without_weights_behind_a_frozen_tower_has_nothing_to_train(tiny_clip_dir: Path, tmp_path: Path) -> None:
    model = make(tiny_clip_dir, head="otam", freeze_backbone=True)
    with pytest.raises(UserError, match="nothing to train"):
        trainer(tmp_path, max_steps=1).fit(model, UsersData())


def test_a_head_that_fits_a_model_in_each_episode_is_not_trained(tiny_clip_dir: Path, tmp_path: Path) -> None:
    model = make(tiny_clip_dir, head="linear_probe")
    with pytest.raises(UserError, match=r"linear_probe fits a model in each episode.*clip-m2df test"):
        trainer(tmp_path, max_steps=1).fit(model, UsersData())


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_models_are_copied_and_pickled_with_their_scores(tiny_clip_dir: Path, head: str, copied: Any) -> None:
    model = make(tiny_clip_dir, head=head).eval()
    again = copied(model)
    assert list(again.state_dict()) == list(model.state_dict())
    episode = make_episodes(2)
    with torch.no_grad():
        expected = model(episode).logits
        assert torch.equal(again(episode).logits, expected)
        for weight in again.parameters():  # no memory in common
            weight.zero_()
        assert torch.equal(model(episode).logits, expected)
