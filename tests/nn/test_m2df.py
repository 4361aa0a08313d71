import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clip_m2df.clip.backbone import CLIPBackbone
from clip_m2df.errors import UserError
from clip_m2df.nn.baselines import OTAMHead, build_head
from clip_m2df.nn.class_text import class_text_logits
from clip_m2df.nn.distillation import mutual_distillation
from clip_m2df.nn.head import Embedded
from clip_m2df.nn.m2df import M2DF, M2DFHead
from clip_m2df.nn.prompts import SelectedPrompts, select_prompts
from tests.conftest import GOLDEN, read_golden
from tests.nn import references

HEADS = sorted(path.stem for path in GOLDEN.glob("head_*.npz"))
DIRECTIONS = {"up2down": "global_to_local", "down2up": "local_to_global", "bid": "mutual"}


def published_options(meta: dict[str, Any]) -> dict[str, Any]:
    return {
        "reliability": [name for name in ("text", "visual") if meta[f"{name}_reliability"]],
        "direction": DIRECTIONS[meta["direction"]],
        "single_direction": meta["otam_single_direction"],
    }


def episode(seed: int = 0, *leading: int, dim: int = 16, n_shot: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((*leading, 3, n_shot, 8, dim), (*leading, 6, 8, dim), (*leading, 3, dim))
    support, query, prompts = (torch.randn(shape, generator=generator) for shape in shapes)
    return support, query, prompts


def make_head(seed: int = 0, **options: Any) -> M2DFHead:
    torch.manual_seed(seed)
    return M2DFHead(**({"dim": 16, "hidden_dim": 32} | options)).eval()


@pytest.mark.parametrize("name", HEADS)
def test_golden_numbers(name: str) -> None:
    golden, state = read_golden(name)
    assert len(HEADS) == 5
    meta = json.loads(str(np.load(GOLDEN / f"{name}.npz")["meta"]))
    head = M2DFHead.from_published(state, **published_options(meta))
    assert not head.training

    support, query = golden["support_features"].requires_grad_(), golden["query_features"].requires_grad_()
    by_class = golden["support_labels"].argsort(stable=True)
    shaped = support[by_class].unflatten(0, (meta["way"], meta["shot"]))
    table = golden["text_features"]
    prompts = table[golden["class_indices"]]
    output = head(shaped, query, prompts)
    match = F.cross_entropy(output.logits, golden["query_labels"], reduction="sum")
    (match + output.distillation_loss).backward()
    of_support, of_query = class_text_logits(head, shaped, query, prompts, table)
    in_file_order = of_support.flatten(0, 1)[by_class.argsort()]

    close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(output.prompt_probabilities, golden["prompt_probabilities"], **close)
    assert torch.equal(output.prompt_indices, golden["prompt_indices"])
    torch.testing.assert_close(output.logits, golden["logits"], **close)
    torch.testing.assert_close(torch.cat((in_file_order, of_query)), golden["class_text_logits"], **close)
    torch.testing.assert_close(match, golden["match_loss_sum"], **close)
    torch.testing.assert_close(output.distillation_loss, golden["distillation_loss"], **close)
    torch.testing.assert_close(support.grad, golden["grad_support"], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(query.grad, golden["grad_query"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [{}, {"views": ["global"]}, {"depth": 2, "pps": False}, {"reliability": []}, {"selection": "each"}],
)
def test_a_batch_of_episodes_equals_one_at_a_time(options: dict[str, Any]) -> None:
    head = make_head(**options)
    support, query, prompts = episode(0, 2, 3)
    together = head(support, query, prompts)
    tables = class_text_logits(head, support, query, prompts, prompts)
    for i in range(2):
        for j in range(3):
            alone = head(support[i, j], query[i, j], prompts[i, j])
            torch.testing.assert_close(together.logits[i, j], alone.logits)
            torch.testing.assert_close(together.distillation_loss[i, j], alone.distillation_loss)
            assert torch.equal(together.prompt_indices[i, j], alone.prompt_indices)
            expected = class_text_logits(head, support[i, j], query[i, j], prompts[i, j], prompts[i, j])
            for table, one in zip(tables, expected, strict=True):
                torch.testing.assert_close(table[i, j], one)


def test_steps_compose_to_the_head() -> None:
    head = make_head(view_weights=[0.5, 2.0])
    support, query, prompts = episode()
    output = head(support, query, prompts)
    selected = head.select_prompts(query, prompts)
    assert selected.indices.equal(output.prompt_indices)
    assert selected.embeddings.equal(prompts[selected.indices])
    prototypes = head.prototype(head.embed(support, prompts[:, None].expand(3, 2, 16)), prompts)
    matched = head.match(head.embed(query, selected.embeddings), prototypes, selected)
    for found in (matched, head.score(query, prompts, head.prototypes(support, prompts))):
        torch.testing.assert_close(found.logits, output.logits)
        for view, compared in output.views.items():
            torch.testing.assert_close(found.views[view], compared)
        torch.testing.assert_close(found.distillation, output.distillation)
    local, global_ = output.views["local"], output.views["global"]
    torch.testing.assert_close(global_.text_confidence, global_.text_similarities.softmax(-1).amax(-1))
    torch.testing.assert_close(output.logits, -(0.5 * local.distances + 2 * global_.distances))
    torch.testing.assert_close(output.distillation_loss, mutual_distillation(local, global_).loss)


@pytest.mark.parametrize("options", [{}, {"pps": False}, {"selection": "expectation"}, {"selection": "each"}])
@pytest.mark.parametrize("frames", [8, 5])
def test_videos_embedded_at_once_are_as_when_embedded_apart(options: dict[str, Any], frames: int) -> None:
    head = make_head(**options)
    support, query, prompts = episode(0, 2)
    query = query[..., :frames, :]  # of another length than the support
    together = head(support, query, prompts)
    apart = head.score(query, prompts, head.prototypes(support, prompts))
    torch.testing.assert_close(together, apart)


def test_a_class_is_what_it_is_by_itself_whatever_the_shots_of_the_others() -> None:
    head = make_head()
    support, query, prompts = episode(n_shot=3)
    shots = (1, 3, 2)
    alone = [
        head.prototypes(videos[None, :n], prompt[None]).map(lambda tokens: tokens[0])
        for videos, prompt, n in zip(support, prompts, shots, strict=True)
    ]
    output = head.score(query, prompts, Embedded.stack(alone))
    for c, n in enumerate(shots):
        expected = head(support[:, :n], query, prompts)
        torch.testing.assert_close(output.logits[:, c], expected.logits[:, c])


@pytest.mark.parametrize(
    ("options", "training", "evaluation"),
    [
        ({}, "class", "class"),
        ({"selection": "expectation"}, "class", "mixture"),
        ({"train_selection": "expectation", "selection": "sample"}, "mixture", "class"),
        ({"pps": False, "selection": "expectation"}, "none", "none"),
        ({"selection": "each"}, "class", "each"),
        ({"train_selection": "each"}, "each", "class"),
        ({"pps": False, "selection": "each"}, "none", "none"),
    ],
)
def test_a_head_says_what_its_queries_are_embedded_with(
    options: dict[str, Any], training: str, evaluation: str
) -> None:
    head = make_head(**options)
    assert head.query_prompt == evaluation
    assert head.train().query_prompt == training


def test_training_draws_prompts_and_evaluation_takes_the_likeliest() -> None:
    head = make_head(temperature=1.0)
    inputs = episode()
    draws = torch.full((6,), 1 - 2**-20)
    assert head.train()(*inputs, draws).prompt_indices.tolist() == [2] * 6
    output = head.eval()(*inputs, draws)
    assert torch.equal(output.prompt_indices, output.prompt_probabilities.argmax(-1))
    with pytest.raises(UserError, match=r"'sample' needs draws.*episode_draws"):
        head.train()(*inputs)


@pytest.mark.parametrize(
    "options",
    [{}, {"views": ["global"], "depth": 2}, {"single_direction": True, "view_weights": [0.5, 2.0], "smoothing": 0.1}],
)
def test_with_each_prompt_a_query_meets_each_class_as_if_there_were_no_other(options: dict[str, Any]) -> None:
    """With one class PPS has no choice: a column of the distances is that of an episode of this class alone."""
    support, query, prompts = episode(n_shot=2)
    inputs = support.requires_grad_(), query.requires_grad_(), prompts.requires_grad_()
    output = make_head(selection="each", **options)(*inputs)
    alone = [make_head(**options)(support[c : c + 1], query, prompts[c : c + 1]) for c in range(3)]
    torch.testing.assert_close(output.logits, torch.cat([one.logits for one in alone], -1))
    for name, view in output.views.items():
        for of_each, of_one in zip(view, zip(*(one.views[name] for one in alone), strict=True), strict=True):
            torch.testing.assert_close(of_each, torch.cat(of_one, -1))
    if len(output.views) == 2:
        expected = mutual_distillation(output.views["local"], output.views["global"])
        torch.testing.assert_close(output.distillation, expected)
    likeliest = make_head(**options)(*inputs)
    assert output.prompt_indices.equal(likeliest.prompt_indices)
    assert output.prompt_probabilities.equal(likeliest.prompt_probabilities)
    assert (output.logits - likeliest.logits).abs().max() > 0.1
    # Where PPS has chosen the very class, both are the same.
    chosen = output.prompt_indices.unsqueeze(-1)
    torch.testing.assert_close(output.logits.gather(-1, chosen), likeliest.logits.gather(-1, chosen))
    weights = torch.randn(output.logits.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((weights * output.logits).sum(), inputs)
    expected_gradients = torch.autograd.grad(
        sum((weights[:, c : c + 1] * one.logits).sum() for c, one in enumerate(alone)), inputs
    )
    torch.testing.assert_close(found, expected_gradients, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_with_each_prompt_distances_are_those_of_a_loop() -> None:
    head = make_head(selection="each")
    support, query, prompts = episode(n_shot=2)
    output = head(support, query, prompts)
    for q, c in itertools.product(range(6), range(3)):
        for name, view in head.views.items():
            fused = view(query[q : q + 1], prompts[c : c + 1])[0]
            first, second = (view(shot[None], prompts[c : c + 1])[0] for shot in support[c])
            prototype = (first + second) / 2
            expected = references.otam_of(1 - references.cosines(fused[None, 1:], prototype[None, 1:]))
            assert output.views[name].distances[q, c].item() == pytest.approx(expected.item(), abs=1e-4)
            text = references.cosine(fused[0].tolist(), prototype[0].tolist())
            assert output.views[name].text_similarities[q, c].item() == pytest.approx(text, abs=1e-5)


def test_without_pps_the_queries_prompts_are_zero_and_the_probabilities_remain() -> None:
    support, query, prompts = episode()
    with_pps, without = make_head()(support, query, prompts), make_head(pps=False)(support, query, prompts)
    head = make_head()
    selected = head.select_prompts(query, prompts)
    matched = head.match(head.embed(query, torch.zeros(6, 16)), head.prototypes(support, prompts), selected)
    torch.testing.assert_close(without.views["local"].distances, matched.views["local"].distances)
    assert torch.equal(with_pps.prompt_probabilities, without.prompt_probabilities)


def test_a_single_view_has_its_own_weights_only_and_no_distillation() -> None:
    head = make_head(views=["local"])
    output = head(*episode())
    assert list(output.views) == ["local"]
    assert output.distillation_loss.item() == 0
    assert not any("global" in name for name in head.state_dict())
    torch.testing.assert_close(output.logits, -output.views["local"].distances)


def test_every_option_of_matching_and_distillation_reaches_its_stage() -> None:
    inputs = episode()
    default = make_head()(*inputs)
    changes: tuple[dict[str, Any], ...] = (
        {"single_direction": True},
        {"smoothing": 0.1},
        {"top_k": 1},
        {"temperature": 1.0},
        {"view_weights": [1, 0]},
        {"direction": "local_to_global"},
        {"reliability": ["visual"]},
        {"reliability": []},
        {"selection": "expectation", "temperature": 1.0},
        {"selection": "each"},
    )
    for options in changes:
        output = make_head(**options)(*inputs)
        same = [
            torch.equal(default.logits, output.logits),
            torch.equal(default.distillation_loss, output.distillation_loss),
            torch.equal(default.prompt_probabilities, output.prompt_probabilities),
        ]
        assert not all(same), options


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("selection", ["argmax", "expectation", "each"])
def test_under_autocast_results_are_float32_and_finite(dtype: torch.dtype, selection: str) -> None:
    head = make_head(selection=selection, temperature=5.0)
    support, query, prompts = episode()
    query.requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        output = head(support, query, prompts)
        loss = F.cross_entropy(output.logits, torch.arange(6) % 3) + output.distillation_loss
        selected = select_prompts(output.prompt_probabilities, prompts, head.selection)
    loss.backward()
    assert output.logits.dtype == output.prompt_probabilities.dtype == torch.float32
    assert torch.equal(output.prompt_probabilities, head(support, query, prompts).prompt_probabilities)
    assert torch.equal(
        selected.embeddings, select_prompts(output.prompt_probabilities, prompts, head.selection).embeddings
    )
    assert query.grad is not None
    assert query.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("frames", [8, 64])
def test_matching_and_losses_under_autocast_are_within_a_thousandth_of_a_float64_loop(
    dtype: torch.dtype, frames: int
) -> None:
    # The same fused sequences, as autocast leaves them, for both: what follows is float32 whatever the autocast.
    head = make_head(direction="mutual", reliability=["text", "visual"])
    generator = torch.Generator().manual_seed(0)

    def fused(n: int) -> Embedded:
        shape = (n, 1 + frames, 16)
        return Embedded({view: torch.randn(shape, generator=generator).to(dtype) for view in ("local", "global")})

    query, prototypes, labels = fused(4), fused(3), torch.tensor([0, 1, 2, 0])
    prompts = torch.randn(3, 16, generator=generator).to(dtype)
    raw = query["local"][:, 1:]
    nothing = SelectedPrompts(prompts[labels], labels, torch.zeros(4, 3))  # of which matching makes no use
    with torch.autocast("cpu", dtype=dtype):
        output = head.match(query, prototypes, nothing)
        match = F.cross_entropy(output.logits, labels, reduction="sum")
        class_logits = class_text_logits(head, raw[:3].unsqueeze(1), raw, prompts, prompts)[1]
        class_loss = F.cross_entropy(class_logits, labels, reduction="sum")

    distances, texts = {}, {}
    for view in ("local", "global"):
        q, p = query[view], prototypes[view]
        cosines = references.cosines(q[:, None].expand(4, 3, -1, -1), p.expand(4, 3, -1, -1))[..., 1:, 1:]
        distances[view] = references.otam_of(1 - cosines)
        texts[view] = references.cosines(q[:, :1].transpose(0, 1), p[:, :1].transpose(0, 1))[0]
        assert (output.views[view].distances - distances[view]).abs().max() < 1e-3
    fused_rows = (-(distances["local"] + distances["global"])).tolist()
    expected = -sum(math.log(references.softmax(row)[c]) for row, c in zip(fused_rows, labels.tolist(), strict=True))
    assert match.item() == pytest.approx(expected, abs=1e-3)
    taught = references.distillation(distances, texts, ["text", "visual"], "mutual")[0]
    assert output.distillation_loss.item() == pytest.approx(taught, abs=1e-3)
    expected = 0.0
    cosines = references.cosines(prompts.expand(4, -1, -1), raw)
    for video, rows, c in zip(raw.double(), cosines, labels.tolist(), strict=True):
        best = rows.topk(4)
        likeliest = best.indices[best.values.sum(-1).argmax()]
        mean = video[likeliest].mean(0)
        logits = references.cosines(mean.view(1, 1, 16), prompts.unsqueeze(0)).flatten()
        expected -= math.log(references.softmax(logits.tolist())[c])
    assert class_loss.item() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": ["locl"]}, "views: 'locl' is not one of local, global"),
        ({"views": []}, "views is empty"),
        ({"views": "local"}, r"views: give a list, \[local\]"),
        ({"views": ["local", "local"]}, "names one twice"),
        ({"view_weights": [1.0]}, "view_weights has 1 numbers for 2 views"),
        ({"reliability": ["texts"]}, "reliability: 'texts' is not one of text, visual"),
        ({"direction": "both"}, "direction: 'both' is not one of local_to_global, global_to_local, mutual"),
        ({"selection": "max"}, "selection: 'max' is not one of argmax, sample, expectation, each"),
        ({"train_selection": "max"}, "train_selection: 'max'"),
        ({"top_k": 0}, "top_k is 0"),
        ({"smoothing": 0.0}, "smoothing is 0.0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"hidden_dim": 0}, "hidden_dim is 0"),
        ({"dropout": 1.5}, "dropout is 1.5"),
        ({"attention_dropout": -0.5}, "attention_dropout is -0.5"),
        ({"num_heads": 0}, "no multiple of 0 attention heads"),
        ({"depth": 0}, "depth 0"),
        ({"head": "otam", "smoothing": -1.0}, "smoothing is -1.0"),
        ({"head": "zero_shot", "temperature": 0.0}, "temperature is 0.0"),
        ({"head": "bi_mhm", "top_k": 0}, "top_k is 0"),
        ({"head": "clip_fsar", "hidden_dim": 0}, "hidden_dim is 0"),
        ({"head": "clip_fsar", "dropout": 1.0}, "dropout is 1.0"),
        ({"head": "clip_fsar", "num_heads": 3}, "dim 16 is no multiple of 3 attention heads"),
        ({"dept": 2}, "M2DFHead has no option 'dept'; did you mean 'depth'"),
        ({"single_direction": "False"}, "single_direction is 'False'; it must be true or false"),
        ({"head": "otam", "single_direction": None}, "single_direction is None; it must be true or false"),
        ({"head": f"{__name__}.OtherHead", "zzz": 2}, "OtherHead has no option 'zzz'; it has dim, width"),
        ({"head": "otam", "smoothing": "much"}, "smoothing is .much.; it must be a number"),
        ({"head": "m2dff"}, "head: 'm2dff' is neither one of m2df, .*, ts_fsar nor a class path"),
        ({"head": "no.such.Head"}, "'no.such.Head' can't be imported"),
        ({"head": "os.path.join"}, "'os.path.join' is no head"),
        ({"dim": 12}, "dim 12 is no multiple of 8"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"head": "m2df", "dim": 16, **options}
    with pytest.raises(UserError, match=message):
        build_head(given.pop("head"), given)


def test_published_weights_of_another_model_are_refused_by_key() -> None:
    state = read_golden(HEADS[0])[1]
    with pytest.raises(UserError, match=r"unknown classifier\.weight"):
        M2DFHead.from_published(state | {"classifier.weight": torch.zeros(1)})
    with pytest.raises(UserError, match=r"missing views\.local\.context\.conv1\.weight"):
        M2DFHead.from_published({k: v for k, v in state.items() if k != "context_conv1.weight"})
    with pytest.raises(UserError, match="no key context2"):
        M2DFHead.from_published({})
    with pytest.raises(UserError, match=r"scale is \(2,\), expected \(1,\)"):
        M2DFHead.from_published(state | {"scale": torch.zeros(2)})


def test_published_tower_and_unused_keys_are_passed_over() -> None:
    state = read_golden(HEADS[0])[1]
    assert "context_conv11.weight" in state
    head = M2DFHead.from_published(state | {"backbone.conv1.weight": torch.zeros(3)}, views=["global"])
    assert torch.equal(
        head.state_dict()["views.global.encoder.layers.0.to_q.weight"], state["context_local.layers.0.0.fn.to_q.weight"]
    )


class OtherHead(OTAMHead):
    def __init__(self, *, dim: int, width: int = 3) -> None:
        super().__init__(dim=dim)
        self.width = width


def test_a_head_by_its_class_path() -> None:
    other = build_head(f"{__name__}.OtherHead", {"dim": 16, "width": 5})
    assert isinstance(other, OtherHead)
    assert other.width == 5


def published_file(folder: Path, clip: str = "clip_vit", tower_prefix: str = "visual.") -> Path:
    """A published checkpoint file: the head's weights, and the tower's under ``backbone.*``."""
    weights = read_golden(clip)[1].items()
    tower = {f"backbone.{name.removeprefix(tower_prefix)}": weight for name, weight in weights if "visual." in name}
    state = published_head(dim=32) | tower
    torch.save({"epoch": 3, "model_state_dict": state, "cfg": "TRAIN: true"}, folder / "checkpoint.pyth")
    return folder / "checkpoint.pyth"


def published_head(dim: int) -> dict[str, Tensor]:
    """Weights of a head of another width, under the published names."""
    generator = torch.Generator().manual_seed(0)
    state = read_golden(HEADS[0])[1]
    shapes = {k: [dim if size == 16 else size for size in v.shape] for k, v in state.items()}
    return {k: 0.1 * torch.randn(shape, generator=generator) for k, shape in shapes.items()}


def clip_of(name: str = "clip_vit", *, visual: float = 0.0) -> CLIPBackbone:
    """The golden CLIP, with other weights in its visual tower."""
    state = {k: visual * v if k.startswith("visual.") else v for k, v in read_golden(name)[1].items()}
    return CLIPBackbone.from_openai(state, head_width=64, activation="quick_gelu")


# What data parallelism puts before the names: of the tower, as the published code does by default, or of the whole.
WRAPPERS: dict[str, Callable[[str], str]] = {"plain": lambda key: key, "whole": lambda key: f"module.{key}"} | {
    "tower": lambda key: key.replace("backbone.", "backbone.module.", 1)
}


@pytest.mark.parametrize("name", ["clip_vit", "clip_resnet"])
@pytest.mark.parametrize("tower_prefix", ["visual.", ""])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_published_checkpoint_file_gives_tower_and_head(
    tmp_path: Path, name: str, tower_prefix: str, wrapper: str
) -> None:
    file = published_file(tmp_path, name, tower_prefix)
    saved = torch.load(file, weights_only=True)
    state = {WRAPPERS[wrapper](key): weight for key, weight in saved["model_state_dict"].items()}
    torch.save(saved | {"model_state_dict": state}, file)
    clip = clip_of(name)
    model = M2DF.from_published(file, clip=clip, direction="mutual")
    assert not model.training
    golden, _ = read_golden(name)
    features = model.backbone.encode_frames(golden["image"])
    torch.testing.assert_close(features, golden["image_features"], rtol=1e-4, atol=1e-4)
    texts = model.backbone.encode_text(golden["tokens"])
    torch.testing.assert_close(texts, golden["text_features"], rtol=1e-4, atol=1e-4)
    assert isinstance(model.head, M2DFHead)
    assert (model.head.direction, model.head.selection) == ("mutual", "sample")
    expected = M2DFHead.from_published(published_head(dim=32)).state_dict()
    for key, value in model.head.state_dict().items():
        assert torch.equal(value, expected[key])
    # Frames are scaled to [0, 1] and no further.
    frames = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
    assert torch.equal(model.backbone.normalise(frames), frames / 255)
    # What was given stays as it is.
    assert not any(weight.any() for weight in clip.visual.parameters())
    assert clip.mean.all()


def test_a_text_tower_in_a_published_file_is_taken_too(tmp_path: Path) -> None:
    golden, weights = read_golden("clip_vit")
    tower = {f"backbone.{name}": weight for name, weight in weights.items()}
    torch.save(published_head(dim=32) | tower | {"backbone.logit_scale": torch.ones(())}, tmp_path / "both.pt")
    clip = clip_of()
    for name, weight in clip.state_dict().items():
        weight.mul_(0.0 if name.startswith("text.") else 1.0)
    model = M2DF.from_published(tmp_path / "both.pt", clip=clip)
    texts = model.backbone.encode_text(golden["tokens"])
    torch.testing.assert_close(texts, golden["text_features"], rtol=1e-4, atol=1e-4)


def test_half_precision_and_ablations_are_read(tmp_path: Path) -> None:
    saved = torch.load(published_file(tmp_path), weights_only=True)
    torch.save({k: v.half() for k, v in saved["model_state_dict"].items()}, tmp_path / "half.pt")
    model = M2DF.from_published(tmp_path / "half.pt", clip=clip_of(), views=["global"], selection="argmax")
    assert isinstance(model.head, M2DFHead)
    assert list(model.head.views) == ["global"]
    assert model.head.selection == "argmax"
    key = "views.global.encoder.layers.0.to_q.weight"
    expected = published_head(dim=32)["context_local.layers.0.0.fn.to_q.weight"]
    assert torch.equal(model.state_dict()[f"head.{key}"], expected.half().float())


def test_a_model_encodes_raw_frames_as_its_tower_encodes_them_normalised() -> None:
    model = M2DF(clip_of(visual=1.0), make_head(dim=32)).eval()
    generator = torch.Generator().manual_seed(0)
    support = torch.randint(0, 256, (2, 3, 1, 4, 3, 32, 32), generator=generator, dtype=torch.uint8)
    query = torch.randint(0, 256, (2, 6, 4, 3, 32, 32), generator=generator, dtype=torch.uint8)
    episode: Any = {"support": support, "query": query}
    with torch.no_grad():
        mean, std = model.backbone.mean, model.backbone.std
        expected = [model.backbone.encode_frames((x / 255 - mean) / std) for x in (support, query)]
        torch.testing.assert_close(model.encode_episode(episode), tuple(expected))


def test_files_that_are_no_published_checkpoint_are_refused(tmp_path: Path) -> None:
    file = published_file(tmp_path)
    state = torch.load(file, weights_only=True)["model_state_dict"]
    clip = clip_of()
    torch.save({k: v for k, v in state.items() if not k.startswith("backbone.")}, tmp_path / "head.pt")
    with pytest.raises(UserError, match=r"head\.pt: it holds no tower under backbone\.\*"):
        M2DF.from_published(tmp_path / "head.pt", clip=clip)
    torch.save({"model_state_dict": 3}, tmp_path / "odd.pt")
    with pytest.raises(UserError, match=r"odd\.pt isn't a plain table of tensors"):
        M2DF.from_published(tmp_path / "odd.pt", clip=clip)
    with pytest.raises(UserError, match="no such file"):
        M2DF.from_published(tmp_path / "none.pt", clip=clip)
    torch.save({"weight": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt: not a published CLIP-M²DF checkpoint: no key context2"):
        M2DF.from_published(tmp_path / "other.pt", clip=clip)
    torch.save({k: v for k, v in state.items() if k != "backbone.ln_pre.weight"}, tmp_path / "lacking.pt")
    with pytest.raises(UserError, match=r"lacking\.pt: .* visual\.ln_pre\.weight is missing"):
        M2DF.from_published(tmp_path / "lacking.pt", clip=clip)
    torch.save(state | {"backbone.proj": torch.full((64, 32), torch.nan)}, tmp_path / "nan.pt")
    with pytest.raises(UserError, match=r"nan\.pt: .* visual\.proj is not finite"):
        M2DF.from_published(tmp_path / "nan.pt", clip=clip)


def test_a_clip_that_the_training_did_not_begin_with_is_refused_by_what_differs(tmp_path: Path) -> None:
    file = published_file(tmp_path)
    state = torch.load(file, weights_only=True)["model_state_dict"]
    more = {k.replace("resblocks.0.", "resblocks.2."): v for k, v in state.items() if "resblocks.0." in k}
    torch.save(state | more, tmp_path / "deeper.pt")
    with pytest.raises(UserError, match=r"deeper\.pt: its visual .*with num_hidden_layers 3, not 2: give the CLIP"):
        M2DF.from_published(tmp_path / "deeper.pt", clip=clip_of())
    torch.save(state | {"backbone.proj": torch.ones(64, 16)}, tmp_path / "narrow.pt")
    with pytest.raises(UserError, match=r"its visual tower is another .*with projection_dim 16, not 32"):
        M2DF.from_published(tmp_path / "narrow.pt", clip=clip_of())
    with pytest.raises(UserError, match=r"its visual tower is another .*with kind vit, not resnet"):
        M2DF.from_published(file, clip=clip_of("clip_resnet"))
    gelu = CLIPBackbone.from_openai(read_golden("clip_vit")[1], head_width=64, activation="gelu")
    with pytest.raises(UserError, match="with hidden_act quick_gelu, not gelu"):
        M2DF.from_published(file, clip=gelu)
    visual = {name: weight for name, weight in read_golden("clip_vit")[1].items() if name.startswith("visual.")}
    with pytest.raises(UserError, match="the prompts need a text tower"):
        M2DF.from_published(file, clip=CLIPBackbone.from_openai(visual, head_width=64, activation="quick_gelu"))
    other: Any = "tiny"
    with pytest.raises(UserError, match=r"clip is of the type str, no CLIP: give CLIPBackbone\.load"):
        M2DF.from_published(file, clip=other)
