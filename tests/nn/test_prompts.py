import pytest
import torch

from clip_m2df import CLIPM2DF
from clip_m2df.errors import UserError
from clip_m2df.nn.prompts import (
    check_templates,
    draw_classes,
    ensemble,
    fill_template,
    prompt_probabilities,
    prompt_scores,
    select_prompts,
)
from tests.nn import references


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("frames", "top_k"), [(8, 4), (3, 4), (5, 1)])
def test_probabilities_equal_the_loop(frames: int, top_k: int) -> None:
    query, prompts = features(2, 6, frames, 16), features(2, 3, 16, seed=1)
    probabilities = prompt_probabilities(prompt_scores(query, prompts, top_k))
    expected = [references.prompt_probabilities(query[b], prompts[b], top_k) for b in range(2)]
    torch.testing.assert_close(probabilities, torch.tensor(expected), rtol=1e-3, atol=1e-5)


def test_draws_invert_the_cumulative_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(200, 5, generator=generator).pow(8)
    probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    draws = torch.rand(200, generator=generator)
    expected = [references.draw(p, u) for p, u in zip(probabilities.tolist(), draws.tolist(), strict=True)]
    assert draw_classes(probabilities, draws).tolist() == expected


@pytest.mark.parametrize(
    ("probabilities", "uniform", "drawn"),
    [
        ([0.25, 0.0, 0.75], 0.0, 0),
        ([0.25, 0.0, 0.75], 0.25, 2),
        ([0.0, 0.5, 0.5], 0.0, 1),
        ([0.5, 0.5, 0.0], 1 - 2**-24, 1),
        ([1e-30, 1.0, 0.0], 1 - 2**-24, 1),
    ],
)
def test_draws_at_the_edges_never_take_an_impossible_class(
    probabilities: list[float], uniform: float, drawn: int
) -> None:
    assert draw_classes(torch.tensor(probabilities), torch.tensor(uniform)).item() == drawn


def test_draws_follow_the_probabilities() -> None:
    draws = torch.rand(20000, generator=torch.Generator().manual_seed(0))
    counts = draw_classes(torch.tensor([0.1, 0.2, 0.7]).expand(20000, 3), draws).bincount() / 20000
    torch.testing.assert_close(counts, torch.tensor([0.1, 0.2, 0.7]), atol=0.01, rtol=0)


def test_each_selection_picks_what_it_says() -> None:
    prompts = features(2, 3, 16)
    probabilities = torch.tensor([[[0.1, 0.6, 0.3], [0.5, 0.2, 0.3]]]).expand(2, 2, 3)
    likeliest = select_prompts(probabilities, prompts, "argmax")
    assert likeliest.indices.tolist() == [[1, 0], [1, 0]]
    assert torch.equal(likeliest.embeddings, torch.stack((prompts[:, 1], prompts[:, 0]), 1))
    drawn = select_prompts(probabilities, prompts, "sample", torch.tensor([[0.05, 0.95], [0.65, 0.05]]))
    assert drawn.indices.tolist() == [[0, 2], [1, 0]]
    assert torch.equal(drawn.embeddings[0], prompts[0, [0, 2]])
    mean = select_prompts(probabilities, prompts, "expectation")
    torch.testing.assert_close(mean.embeddings[1, 0], prompts[1].T @ torch.tensor([0.1, 0.6, 0.3]))
    assert mean.indices.tolist() == [[1, 0], [1, 0]]
    each = select_prompts(probabilities, prompts, "each")
    assert each.indices.tolist() == [[1, 0], [1, 0]]
    assert torch.equal(each.embeddings, torch.stack((prompts, prompts), 1))


def test_templates() -> None:
    assert fill_template("a photo of {}", ["draw sword", "{curly}"]) == ["a photo of draw sword", "a photo of {curly}"]
    assert check_templates("a photo of {}") == ["a photo of {}"]
    assert check_templates(("{}", "a {}")) == ["{}", "a {}"]
    with pytest.raises(UserError, match=r"'a photo' has no \{\}"):
        check_templates(["{}", "a photo"])
    with pytest.raises(UserError, match="looks like a list: put each of its templates in quotes"):
        check_templates("[a photo of {}, a video of {}]")
    with pytest.raises(UserError, match="template is empty"):
        check_templates([])


def test_an_ensemble_is_the_mean_of_normalised_embeddings_at_their_mean_norm() -> None:
    embeddings = torch.tensor([[[3.0, 4.0], [0.0, 2.0]], [[0.0, 1.0], [8.0, 0.0]]])
    # Class 0: (0.6, 0.8) and (0, 1) point to (0.6, 1.8), norms 5 and 1; class 1: (0, 1) and (1, 0), norms 2 and 8.
    expected = [[3 * 0.6 / 3.6**0.5, 3 * 1.8 / 3.6**0.5], [5 / 2**0.5, 5 / 2**0.5]]
    torch.testing.assert_close(ensemble(embeddings), torch.tensor(expected))
    assert torch.equal(ensemble(embeddings[:1]), embeddings[0])
    torch.testing.assert_close(ensemble(embeddings[[0, 0, 0]]), embeddings[0])


LONG = "a person who " + "very slowly and carefully " * 20


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        (("moving", "jumping", "moving"), "'x' and 'z' have one text, 'moving', so that no prompt tells them apart"),
        (("Moving", "jumping", "moving "), "'x' and 'z' have one text"),
        ((f"{LONG}opens", "jumping", f"{LONG}closes"), "which reads 77 tokens: give each a text that differs before"),
    ],
)
@pytest.mark.parametrize(
    ("head", "refused"), [("m2df", True), ("clip_fsar", True), ("zero_shot", True), ("otam", False)]
)
def test_classes_with_one_prompt(texts: tuple[str, ...], reason: str, head: str, refused: bool) -> None:
    model = CLIPM2DF(backbone="tiny", head=head).model
    if not refused:
        assert model.encode_prompts(texts, "xyz").shape[0] == 3
        # The text counts in other ways too.
        model = CLIPM2DF(backbone="tiny", head=head, text_fusion=0.5).model
    with pytest.raises(UserError, match="the classes 'x' and 'z' have ") as caught:
        model.encode_prompts(texts, "xyz")
    assert reason in str(caught.value)
    assert "in the column text of the manifest, or as its name" in str(caught.value)
