"""The tokenizers that SentencePiece trained: Gemma's, SigLIP's and XLM-V's. CLIP's are tested with its backbone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clip_m2df.clip.tokenizer import encoded, read_tokenizer, saved_tokenizer
from tests.clip.towers import save_gemma, save_siglip, save_xlm
from tests.conftest import GOLDEN

Config = dict[str, Any]
SAVED: dict[str, tuple[Callable[..., int], Config]] = {
    "gemma": (save_gemma, {"kind": "siglip", "max_position_embeddings": 64}),
    "siglip": (save_siglip, {"kind": "siglip", "max_position_embeddings": 64}),
    "xlm": (save_xlm, {"kind": "metaclip_2", "max_position_embeddings": 77, "eos_token_id": 2}),
}


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    """2,000 prompts of what two tokenizers may take differently."""
    with np.load(GOLDEN / "tokens.npz") as golden:
        texts: list[str] = json.loads(golden["prompts"].tobytes().decode(errors="surrogatepass"))
    # What UTF-8 can't hold is no text to the references.
    return [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts]


def saved(name: str, folder: Path) -> Config:
    """Save a small tokenizer; what its text tower's config says of it."""
    save, config = SAVED[name]
    return config | {"vocab_size": save(folder)}


SPECIAL = ["a <eos> b", "a</s>b", "<s> a <mask>  b", "<pad>", "<EOS>", "<unk>!", "a <bos>", "\n\na ", "a\u2581b", ""]


def test_gemmas_tokens_are_those_of_transformers(prompts: list[str], tmp_path: Path) -> None:
    from transformers import Siglip2Tokenizer

    config = saved("gemma", tmp_path)
    reference = Siglip2Tokenizer.from_pretrained(tmp_path)
    texts = prompts + SPECIAL
    expected = reference(texts, padding="max_length", truncation=True, max_length=64)["input_ids"]
    assert encoded(read_tokenizer(tmp_path, config, "it"), texts, "it") == expected
    assert len({token for tokens in expected for token in tokens}) > 200


def test_xlms_tokens_are_those_of_transformers(prompts: list[str], tmp_path: Path) -> None:
    from transformers import XLMRobertaTokenizer

    config = saved("xlm", tmp_path)
    reference = XLMRobertaTokenizer.from_pretrained(tmp_path)
    texts = prompts + SPECIAL
    expected = reference(texts, padding="max_length", truncation=True, max_length=77)["input_ids"]
    assert encoded(read_tokenizer(tmp_path, config, "it"), texts, "it") == expected
    assert len({token for tokens in expected for token in tokens}) > 200


@pytest.mark.parametrize("kind", ["siglip", "metaclip_2"])
def test_siglips_tokens_are_those_of_sentencepiece(kind: str, prompts: list[str], tmp_path: Path) -> None:
    size = save_siglip(tmp_path)
    # Also MetaCLIP 2 has models with the tokenizer of SigLIP's multilingual ones; their ends of text are numbered so.
    config = {"kind": kind, "vocab_size": size, "max_position_embeddings": 64, "eos_token_id": 1}
    tokens = encoded(read_tokenizer(tmp_path, config, "it"), prompts, "it")
    with np.load(GOLDEN / "siglip_tokens.npz") as golden:
        expected = golden["tokens"].tolist()
    # Of a hundred times the same letter, many cuts have the same score.
    rows = [row for row, prompt in enumerate(prompts) if "x" * 100 not in prompt]
    assert len(rows) > 1800
    assert [tokens[row] for row in rows] == [expected[row] for row in rows]


@pytest.mark.parametrize("name", SAVED)
def test_a_saved_tokenizer_is_the_same(name: str, prompts: list[str], tmp_path: Path) -> None:
    config = saved(name, tmp_path)
    tokenizer = read_tokenizer(tmp_path, config, "it")
    again = saved_tokenizer(tokenizer.to_str(), config, "it")
    assert again.to_str() == tokenizer.to_str()
    assert encoded(again, prompts[:200], "it") == encoded(tokenizer, prompts[:200], "it")
    # And saved by transformers once more, whose defaults are others.
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    again = read_tokenizer(tmp_path / "again", config, "it")
    assert encoded(again, prompts[:200], "it") == encoded(tokenizer, prompts[:200], "it")


@pytest.mark.parametrize(("name", "ends"), [("gemma", (1, 0)), ("siglip", (1, 1)), ("xlm", (2, 1))])
def test_texts_are_filled_up_and_cut(name: str, ends: tuple[int, int], tmp_path: Path) -> None:
    config = saved(name, tmp_path) | {"max_position_embeddings": 9}
    short, long = encoded(read_tokenizer(tmp_path, config, "it"), ["a", "fox jumps over " * 20], "it")
    assert short[-3:] == [ends[1]] * 3
    assert ends[0] in short
    assert len(short) == len(long) == 9
    assert long[-1] == ends[0]
    assert ends[0] not in long[:-1]


@pytest.mark.parametrize(("text", "as_if"), [("A_fox's  Jump!\n", "afoxs jump"), ("ΟΔΟΣ", "οδος"), ("</s>a", "sa")])
def test_siglips_texts_are_canonicalised(text: str, as_if: str, tmp_path: Path) -> None:
    tokenizer = read_tokenizer(tmp_path, saved("siglip", tmp_path), "it")
    first, second = encoded(tokenizer, [text, as_if], "it")
    assert first == second


def test_lone_surrogates_are_no_error(tmp_path: Path) -> None:
    for name in SAVED:
        tokenizer = read_tokenizer(tmp_path / name, saved(name, tmp_path / name), "it")
        halves, whole = encoded(tokenizer, ["\ud83d\ude00 \ud800", "\U0001f600 \ufffd"], "it")
        assert halves == whole
