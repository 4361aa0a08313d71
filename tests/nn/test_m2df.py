import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clip_m2df.errors import UserError
from clip_m2df.nn.baselines import build_head
from clip_m2df.nn.m2df import M2DFHead
from clip_m2df.nn.prompts import select_prompts
from clip_m2df.nn.views import FusedSequence
from clip_m2df.training.build import load_published
from tests.nn import references

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("head_*.npz"))
DIRECTIONS = {"up2down": "global_to_local", "down2up": "local_to_global", "bid": "mutual"}


def published_state(file: Path) -> dict[str, Tensor]:
    arrays = np.load(file)
    return {key.removeprefix("state/"): torch.from_numpy(arrays[key]) for key in arrays if key.startswith("state/")}


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


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.stem)
def test_golden_numbers(file: Path) -> None:
    arrays = np.load(file)
    meta = json.loads(str(arrays["meta"]))
    golden = {key: torch.from_numpy(arrays[key]) for key in arrays if not key.startswith("state/") and key != "meta"}
    head = M2DFHead.from_published(published_state(file), **published_options(meta))
    assert not head.training

    support, query = golden["support_features"].requires_grad_(), golden["query_features"].requires_grad_()
    by_class = golden["support_labels"].argsort(stable=True)
    shaped = support[by_class].unflatten(0, (meta["way"], meta["shot"]))
    table = golden["text_features"]
    prompts = table[golden["class_indices"]]
    output = head(shaped, query, prompts)
    match = F.cross_entropy(output.logits, golden["query_labels"], reduction="sum")
    (match + output.distillation_loss).backward()
    of_support, of_query = head.class_logits(shaped, query, prompts, table)
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


def test_there_are_five_golden_heads() -> None:
    assert len(GOLDEN) == 5


@pytest.mark.parametrize("options", [{}, {"views": ["global"]}, {"depth": 2, "pps": False}, {"reliability": []}])
def test_a_batch_of_episodes_equals_one_at_a_time(options: dict[str, Any]) -> None:
    head = make_head(**options)
    support, query, prompts = episode(0, 2, 3)
    together = head(support, query, prompts)
    tables = head.class_logits(support, query, prompts, prompts)
    for i in range(2):
        for j in range(3):
            alone = head(support[i, j], query[i, j], prompts[i, j])
            torch.testing.assert_close(together.logits[i, j], alone.logits)
            torch.testing.assert_close(together.distillation_loss[i, j], alone.distillation_loss)
            assert torch.equal(together.prompt_indices[i, j], alone.prompt_indices)
            expected = head.class_logits(support[i, j], query[i, j], prompts[i, j], prompts[i, j])
            for table, one in zip(tables, expected, strict=True):
                torch.testing.assert_close(table[i, j], one)


def test_stages_compose_to_the_head() -> None:
    head = make_head(view_weights=[0.5, 2.0])
    support, query, prompts = episode()
    output = head(support, query, prompts)
    prototype = head.prototype(head.fuse(support, prompts[:, None].expand(3, 2, 16)))
    evidence = head.match(head.fuse(query, prompts[output.prompt_indices]), prototype)
    torch.testing.assert_close(output.distances["local"], evidence["local"].distances)
    torch.testing.assert_close(
        output.text_confidences["global"], evidence["global"].text_similarities.softmax(-1).amax(-1)
    )
    torch.testing.assert_close(output.logits, -(0.5 * evidence["local"].distances + 2 * evidence["global"].distances))
    torch.testing.assert_close(output.distillation_loss, head.distill(evidence).loss)


def test_a_prototype_is_the_mean_over_the_shots() -> None:
    head = make_head()
    support, _, prompts = episode()
    fused = head.fuse(support, prompts[:, None].expand(3, 2, 16))
    prototype = head.prototype(fused)["global"]
    torch.testing.assert_close(prototype.visual[1], (fused["global"].visual[1, 0] + fused["global"].visual[1, 1]) / 2)
    torch.testing.assert_close(prototype.text[2], (fused["global"].text[2, 0] + fused["global"].text[2, 1]) / 2)


def test_training_draws_prompts_and_evaluation_takes_the_likeliest() -> None:
    head = make_head(temperature=1.0)
    inputs = episode()
    draws = torch.full((6,), 1 - 2**-20)
    assert head.train()(*inputs, draws).prompt_indices.tolist() == [2] * 6
    output = head.eval()(*inputs, draws)
    assert torch.equal(output.prompt_indices, output.prompt_probabilities.argmax(-1))
    with pytest.raises(UserError, match="needs draws"):
        head.train()(*inputs)


def test_without_pps_the_queries_prompts_are_zero_and_the_probabilities_remain() -> None:
    support, query, prompts = episode()
    with_pps, without = make_head()(support, query, prompts), make_head(pps=False)(support, query, prompts)
    head = make_head()
    evidence = head.match(
        head.fuse(query, torch.zeros(6, 16)),
        head.prototype(head.fuse(support, prompts[:, None].expand(3, 2, 16))),
    )
    torch.testing.assert_close(without.distances["local"], evidence["local"].distances)
    assert torch.equal(with_pps.prompt_probabilities, without.prompt_probabilities)


def test_a_single_view_has_its_own_weights_only_and_no_distillation() -> None:
    head = make_head(views=["local"])
    output = head(*episode())
    assert list(output.distances) == ["local"]
    assert output.distillation_loss.item() == 0
    assert not any("global" in name for name in head.state_dict())
    torch.testing.assert_close(output.logits, -output.distances["local"])


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
@pytest.mark.parametrize("selection", ["argmax", "expectation"])
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

    def fused(*leading: int) -> dict[str, FusedSequence]:
        return {
            view: FusedSequence(
                torch.randn(*leading, 16, generator=generator).to(dtype),
                torch.randn(*leading, frames, 16, generator=generator).to(dtype),
            )
            for view in ("local", "global")
        }

    query, prototype, labels = fused(4), fused(3), torch.tensor([0, 1, 2, 0])
    prompts = torch.randn(3, 16, generator=generator).to(dtype)
    raw = query["local"].visual
    with torch.autocast("cpu", dtype=dtype):
        evidence = head.match(query, prototype)
        match = F.cross_entropy(-head.fuse_distances(evidence), labels, reduction="sum")
        distill = head.distill(evidence).loss
        class_logits = head.class_logits(raw[:3].unsqueeze(1), raw, prompts, prompts)[1]
        class_loss = F.cross_entropy(class_logits, labels, reduction="sum")

    distances, texts = {}, {}
    for view in ("local", "global"):
        distances[view] = torch.tensor(
            [
                [
                    sum(
                        references.otam([[1 - references.cosine(a, b) for b in y] for a in x])
                        for x, y in ((q, p), (p, q))
                    )
                    for p in prototype[view].visual.double().tolist()
                ]
                for q in query[view].visual.double().tolist()
            ],
            dtype=torch.float64,
        )
        texts[view] = torch.tensor(
            [
                [references.cosine(q, p) for p in prototype[view].text.double().tolist()]
                for q in query[view].text.double().tolist()
            ],
            dtype=torch.float64,
        )
        assert (evidence[view].distances - distances[view]).abs().max() < 1e-3
    fused_rows = (-(distances["local"] + distances["global"])).tolist()
    expected = -sum(math.log(references.softmax(row)[c]) for row, c in zip(fused_rows, labels.tolist(), strict=True))
    assert match.item() == pytest.approx(expected, abs=1e-3)
    taught = references.distillation(distances, texts, ["text", "visual"], "mutual")[0]
    assert distill.item() == pytest.approx(taught, abs=1e-3)
    expected = 0.0
    for video, c in zip(raw.double().tolist(), labels.tolist(), strict=True):
        cosines = [[references.cosine(p, f) for f in video] for p in prompts.double().tolist()]
        best = [sorted(range(frames), key=lambda t, row=row: -row[t])[:4] for row in cosines]  # type: ignore[misc]
        likeliest = max(range(3), key=lambda n: sum(cosines[n][t] for t in best[n]))
        mean = [sum(video[t][d] for t in best[likeliest]) / 4 for d in range(16)]
        logits = [references.cosine(mean, p) for p in prompts.double().tolist()]
        expected -= math.log(references.softmax(logits)[c])
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
        ({"selection": "max"}, "selection: 'max' is not one of argmax, sample, expectation"),
        ({"train_selection": "max"}, "train_selection: 'max'"),
        ({"top_k": 0}, "top_k 0"),
        ({"smoothing": 0.0}, "smoothing is 0.0; it must be positive"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"hidden_dim": 0}, "hidden_dim is 0"),
        ({"dropout": 1.5}, "dropout is 1.5; it must be from 0 to below 1"),
        ({"attention_dropout": -0.5}, "attention_dropout is -0.5"),
        ({"num_heads": 0}, "no multiple of 0 attention heads"),
        ({"dim": 12}, "dim 12 is no multiple of 8"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_head(**options)


def test_published_weights_of_another_model_are_refused_by_key() -> None:
    state = published_state(GOLDEN[0])
    with pytest.raises(UserError, match=r"unknown classifier\.weight"):
        M2DFHead.from_published(state | {"classifier.weight": torch.zeros(1)})
    with pytest.raises(UserError, match=r"missing views\.local\.context\.conv1\.weight"):
        M2DFHead.from_published({k: v for k, v in state.items() if k != "context_conv1.weight"})
    with pytest.raises(UserError, match="no key context2"):
        M2DFHead.from_published({})
    with pytest.raises(UserError, match=r"scale is \(2,\), expected \(1,\)"):
        M2DFHead.from_published(state | {"scale": torch.zeros(2)})


def test_published_tower_and_unused_keys_are_passed_over() -> None:
    state = published_state(GOLDEN[0])
    assert "context_conv11.weight" in state
    head = M2DFHead.from_published(state | {"backbone.conv1.weight": torch.zeros(3)}, views=["global"])
    assert torch.equal(
        head.state_dict()["views.global.encoder.layers.0.to_q.weight"], state["context_local.layers.0.0.fn.to_q.weight"]
    )


class OtherHead(torch.nn.Module):
    def __init__(self, *, dim: int, width: int = 3) -> None:
        super().__init__()
        self.width = width


def test_heads_by_name_and_class_path() -> None:
    assert isinstance(build_head("m2df", {"dim": 16}), M2DFHead)
    other = build_head(f"{__name__}.OtherHead", {"dim": 16, "width": 5})
    assert other.width == 5
    for name, message in (
        ("m2dff", "head: 'm2dff' is neither one of m2df, .*, clip_fsar nor a class path"),
        ("no.such.Head", "'no.such.Head' can't be imported"),
        ("os.path.join", "'os.path.join' is not a class derived from torch.nn.Module"),
    ):
        with pytest.raises(UserError, match=message):
            build_head(name, {"dim": 16})
    with pytest.raises(UserError, match="M2DFHead has no option 'dept'; did you mean 'depth'"):
        build_head("m2df", {"dim": 16, "dept": 2})
    with pytest.raises(UserError, match="OtherHead has no option 'zzz'; it has dim, width"):
        build_head(f"{__name__}.OtherHead", {"dim": 16, "zzz": 2})


def published_file(folder: Path, clip: Path, tower_prefix: str = "visual.") -> Path:
    """A published checkpoint file: the head's weights, and the tower's under ``backbone.*``."""
    tower = {f"backbone.{k.removeprefix(tower_prefix)}": v for k, v in published_state(clip).items() if "visual." in k}
    state = published_head(dim=32) | tower
    torch.save({"epoch": 3, "model_state_dict": state, "cfg": "TRAIN: true"}, folder / "checkpoint.pyth")
    return folder / "checkpoint.pyth"


def published_head(dim: int) -> dict[str, Tensor]:
    """Weights of a head of another width, under the published names."""
    generator = torch.Generator().manual_seed(0)
    state = published_state(GOLDEN[0])
    shapes = {k: [dim if size == 16 else size for size in v.shape] for k, v in state.items()}
    return {k: 0.1 * torch.randn(shape, generator=generator) for k, shape in shapes.items()}


@pytest.mark.parametrize("name", ["clip_vit", "clip_resnet"])
@pytest.mark.parametrize("tower_prefix", ["visual.", ""])
def test_a_published_checkpoint_file_gives_tower_and_head(tmp_path: Path, name: str, tower_prefix: str) -> None:
    clip = GOLDEN[0].with_name(f"{name}.npz")
    model = load_published(published_file(tmp_path, clip, tower_prefix), direction="mutual")
    assert not model.training
    arrays = np.load(clip)
    features = model.backbone.encode_frames(torch.from_numpy(arrays["image"]))
    torch.testing.assert_close(features, torch.from_numpy(arrays["image_features"]), rtol=1e-4, atol=1e-4)
    assert model.head.direction == "mutual"
    expected = M2DFHead.from_published(published_head(dim=32)).state_dict()
    for key, value in model.head.state_dict().items():
        assert torch.equal(value, expected[key])
    with pytest.raises(UserError, match="no text tower"):
        model.encode_prompts(["a cat"])


def test_a_model_scores_raw_frames_as_its_head_scores_their_features(tmp_path: Path) -> None:
    model = load_published(published_file(tmp_path, GOLDEN[0].with_name("clip_vit.npz")))
    generator = torch.Generator().manual_seed(0)
    support = torch.randint(0, 256, (2, 3, 1, 4, 3, 32, 32), generator=generator, dtype=torch.uint8)
    query = torch.randint(0, 256, (2, 6, 4, 3, 32, 32), generator=generator, dtype=torch.uint8)
    prompts = torch.randn(2, 3, 32, generator=generator)
    with torch.no_grad():
        logits = model(support, query, prompts).logits
        mean, std = model.backbone.mean, model.backbone.std
        encoded = [model.backbone.encode_frames((x / 255 - mean) / std) for x in (support, query)]
        torch.testing.assert_close(logits, model.head(*encoded, prompts).logits)


def test_files_that_are_no_published_checkpoint_are_refused(tmp_path: Path) -> None:
    file = published_file(tmp_path, GOLDEN[0].with_name("clip_vit.npz"))
    state = torch.load(file, weights_only=True)["model_state_dict"]
    torch.save({k: v for k, v in state.items() if not k.startswith("backbone.")}, tmp_path / "head.pt")
    with pytest.raises(UserError, match=r"head\.pt holds no tower under backbone\.\*"):
        load_published(tmp_path / "head.pt")
    torch.save({"model_state_dict": 3}, tmp_path / "odd.pt")
    with pytest.raises(UserError, match=r"odd\.pt isn't a plain table of tensors"):
        load_published(tmp_path / "odd.pt")
    with pytest.raises(UserError, match="no such file"):
        load_published(tmp_path / "none.pt")
