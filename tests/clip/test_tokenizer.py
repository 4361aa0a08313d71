"""The tokenizers that SentencePiece trained: Gemma's, SigLIP's and XLM-V's. CLIP's are tested with its backbone."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clip_m2df.clip.tokenizer import encoded, read_tokenizer, saved_tokenizer
from clip_m2df.errors import UserError
from tests.clip.towers import TOKENIZERS as SAVED
from tests.clip.towers import save_siglip
from tests.conftest import GOLDEN

Config = dict[str, Any]


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


def changed(folder: Path, change: Callable[[Any], object], name: str = "tokenizer.json") -> None:
    """Change the content of a file."""
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


SPECIAL = ["a <eos> b", "a</s>b", "<s> a <mask>  b", "<pad>", "<EOS>", "<unk>!", "a <bos>", "\n\na ", "a\u2581b", ""]


def test_gemmas_tokens_are_those_of_transformers(prompts: list[str], tmp_path: Path) -> None:
    from transformers import Siglip2Tokenizer

    config = saved("gemma", tmp_path)
    reference = Siglip2Tokenizer.from_pretrained(tmp_path)
    texts = prompts + SPECIAL
    expected = reference(texts, padding="max_length", truncation=True, max_length=64)["input_ids"]
    assert encoded(read_tokenizer(tmp_path, config, "it"), texts, "it") == expected
    assert len({token for tokens in expected for token in tokens}) > 200


@pytest.mark.parametrize("with_table", [True, False])
def test_xlms_tokens_are_those_of_transformers(with_table: bool, prompts: list[str], tmp_path: Path) -> None:
    from transformers import XLMRobertaTokenizer

    config = saved("xlm", tmp_path)
    if not with_table:
        changed(tmp_path, lambda content: content.update(normalizer=None))
    reference = XLMRobertaTokenizer.from_pretrained(tmp_path)
    texts = prompts + SPECIAL
    expected = reference(texts, padding="max_length", truncation=True, max_length=77)["input_ids"]
    tokenizer = read_tokenizer(tmp_path, config, "it")
    assert encoded(tokenizer, texts, "it") == expected
    assert encoded(saved_tokenizer(tokenizer.to_str(), config, "it"), texts, "it") == expected
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


# Bad input


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("size", [3, 100_000])
def test_a_tokenizer_of_another_size_is_refused(name: str, size: int, tmp_path: Path) -> None:
    config = saved(name, tmp_path)
    with pytest.raises(UserError, match=f"the tokenizer of 'it' has {config['vocab_size']} tokens and the text tower"):
        read_tokenizer(tmp_path, config | {"vocab_size": size}, "'it'")


def test_a_tower_too_short_for_the_ends_of_a_text_is_refused(tmp_path: Path) -> None:
    config = saved("xlm", tmp_path) | {"max_position_embeddings": 1}
    with pytest.raises(UserError, match="the text tower of it reads 1 tokens, and an empty text has 2"):
        read_tokenizer(tmp_path, config, "it")


@pytest.mark.parametrize("name", SAVED)
def test_a_tokenizer_for_another_tower_is_refused(name: str, tiny_clip_dir: Path, tmp_path: Path) -> None:
    config = saved(name, tmp_path)
    clip = {"vocab_size": config["vocab_size"], "max_position_embeddings": 77, "eos_token_id": 2}
    with pytest.raises(UserError, match=r"'it' (has words with scores|makes .* of an empty text|can't be read)"):
        read_tokenizer(tmp_path, clip, "'it'")
    with pytest.raises(UserError, match=r"'it' (has no \S+, as that of|makes .* of an empty text)"):
        read_tokenizer(tiny_clip_dir, config | {"vocab_size": 515}, "'it'")
    other = SAVED["siglip" if name == "xlm" else "xlm"][1] | {"vocab_size": config["vocab_size"]}
    with pytest.raises(UserError, match=r"'it' (has <s> for its first token|makes .* of an empty text)"):
        read_tokenizer(tmp_path, other | {"eos_token_id": 7}, "'it'")


@pytest.mark.parametrize(
    ("name", "token"),
    [
        *(("gemma", token) for token in ("<eos>", "<pad>", "<unk>")),
        *(("siglip", token) for token in ("</s>", "<unk>")),
        *(("xlm", token) for token in ("</s>", "<pad>", "<unk>")),
    ],
)
def test_a_missing_token_is_named(name: str, token: str, tmp_path: Path) -> None:
    config = saved(name, tmp_path)
    text = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace(json.dumps(token), '"<other>"'))
    with pytest.raises(UserError, match=f"the tokenizer of 'it' has no {token}, as that of a tower of the kind"):
        read_tokenizer(tmp_path, config, "'it'")


def test_siglips_padding_is_held_against_its_training(tmp_path: Path) -> None:
    for name, right in (("gemma", "<pad>"), ("siglip", "</s>")):
        config = saved(name, tmp_path / name)
        file = tmp_path / name / "tokenizer_config.json"
        settings = json.loads(file.read_text())
        for pad in ({"content": right}, right, None):
            file.write_text(json.dumps(settings | {"pad_token": pad}))
            read_tokenizer(tmp_path / name, config, "it")
        file.write_text(json.dumps(settings | {"pad_token": "<eos>"}))
        with pytest.raises(
            UserError, match=f"tokenizer_config.json in .* has the pad_token '<eos>', .* with '{right}'"
        ):
            read_tokenizer(tmp_path / name, config, "it")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("spiece.model", r", only SentencePiece's spiece\.model, which is not read: .* T5Tokenizer\.from_pretrained"),
        ("sentencepiece.bpe.model", r", only .* which is not read: .* by XLMRobertaTokenizer\.from_pretrained"),
        ("tokenizer.model", r", only .*, which is not read: .* backbone_options, tokenizer$"),
        ("tokenizer_config.json", r": put that of the model's repository there, .* backbone_options, tokenizer$"),
        ("vocab.json", r": put that of the model's repository there, .* backbone_options, tokenizer$"),
        ("bpe_simple_vocab_16e6.txt", r": put that of the model's repository there, .* backbone_options, tokenizer$"),
    ],
)
def test_a_folder_without_tokenizer_json(name: str, message: str, tmp_path: Path) -> None:
    config = SAVED["siglip"][1] | {"vocab_size": 450}
    (tmp_path / name).write_text("{}")
    (tmp_path / "merges.txt").write_text("")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match=f"has no tokenizer.json{message if path == tmp_path else ''}"):
            read_tokenizer(path, config, "it")


EXPLODING = {"type": "Split", "pattern": {"Regex": "(a+)+(a+)+(a+)+(a+)+$"}, "behavior": "Isolated", "invert": False}
LONGER = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
ENDS = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "z", "type_id": 0}}] * 100_000}


@pytest.mark.parametrize("name", SAVED)
def test_what_explodes_is_not_run(name: str, tmp_path: Path) -> None:
    config, text = saved(name, tmp_path), "a" * 40 + "b"
    expected = encoded(read_tokenizer(tmp_path, config, "it"), [text], "it")
    part = {
        "pre_tokenizer": EXPLODING,
        "post_processor": {**ENDS, "pair": [], "special_tokens": {"z": {"id": "z", "ids": [5], "tokens": ["z"]}}},
        "padding": {"strategy": {"Fixed": 1 << 40}, "pad_id": 7, "pad_token": "a"},
        "truncation": {"max_length": 1 << 40},
    }

    def change(content: Any) -> None:
        own = content["normalizer"].get("normalizers", [content["normalizer"]])
        steps = [*[LONGER] * 6, {**EXPLODING, "type": "Replace", "content": ""}, *own]
        content |= part | {"normalizer": {"type": "Sequence", "normalizers": steps}}

    changed(tmp_path, change)
    assert encoded(read_tokenizer(tmp_path, config, "it"), [text], "it") == expected
    again = saved_tokenizer((tmp_path / "tokenizer.json").read_text(), config, "it")
    assert encoded(again, [text], "it") == expected


def charsmap(words: bytes, tree: bytes | None = None, size: int | None = None) -> str:
    """A table of characters: the size of a tree, the tree, what characters become."""
    tree = bytes(4 * 256) if tree is None else tree
    return base64.b64encode((len(tree) if size is None else size).to_bytes(4, "little") + tree + words).decode()


@pytest.mark.parametrize(
    "table",
    [
        charsmap(b"a" * 100_000),
        charsmap(b"a" * 65 + b"\0"),
        charsmap(b"a\0", size=1 << 31),
        charsmap(b"", size=3000),
        charsmap(b"", tree=b"", size=0),
        charsmap(b"\xff\xfe\0"),
        charsmap(b"a\0", tree=bytes(1023)),
        "AA==",
        "no base64!",
        "\udcff",
        3,
        [1],
    ],
)
@pytest.mark.parametrize("name", ["siglip", "xlm"])
def test_a_forged_table_of_characters_is_refused(name: str, table: Any, tmp_path: Path) -> None:
    config = saved(name, tmp_path)
    changed(tmp_path, lambda content: content["normalizer"].update(precompiled_charsmap=table))
    with pytest.raises(UserError, match=r"the tokenizer .* (can't be read|fails at a text): .*; fetch its files again"):
        encoded(read_tokenizer(tmp_path, config, "it"), ["a", "ﷺ"], "it")


def test_a_table_of_characters_that_leads_out_of_itself_is_an_error(tmp_path: Path) -> None:
    config = saved("xlm", tmp_path)
    changed(
        tmp_path,
        lambda content: content["normalizer"].update(precompiled_charsmap=charsmap(b"a\0", tree=b"\xff" * 1024)),
    )
    tokenizer = read_tokenizer(tmp_path, config, "it")
    with pytest.raises(UserError, match=r"the tokenizer of it fails at a text: .*; fetch its files again"):
        encoded(tokenizer, ["a", "b"], "it")


def refused(name: str, folder: Path, change: Callable[[Any], object]) -> None:
    """A tokenizer whose file was changed is refused, from its folder and from a description."""
    config = saved(name, folder)
    changed(folder, change)
    with pytest.raises(UserError, match=r"the tokenizer (in|of) .* (can't be read|has|makes)"):
        read_tokenizer(folder, config, "it")
    with pytest.raises(UserError, match=r"the tokenizer of .* (can't be read|has|makes)"):
        saved_tokenizer((folder / "tokenizer.json").read_text(), config, "it")


def _words(content: Any, *words: Any) -> None:
    content["model"]["vocab"][-len(words) :] = words


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["model"].update(vocab=None),
        lambda content: content["model"].update(vocab={}),
        lambda content: content["model"].update(vocab=[]),
        lambda content: content["model"].update(vocab="/etc/passwd", merges="/etc/passwd"),
        lambda content: _words(content, ["a", float("nan")]),
        lambda content: _words(content, ["a", float("inf")]),
        lambda content: _words(content, ["a", "1"]),
        lambda content: _words(content, ["a", True]),
        lambda content: _words(content, ["a", None]),
        lambda content: _words(content, ["", -1.0]),
        lambda content: _words(content, ["\ud800", -1.0]),
        lambda content: _words(content, ["a"]),
        lambda content: _words(content, ["a", -1.0, 2]),
        lambda content: _words(content, 3),
        lambda content: _words(content, *([f"{n:04}" * (1 << 15), -1.0] for n in range(200))),  # 7 GB of a tree
        lambda content: content["added_tokens"].append({"id": 450, "content": "new"}),
        lambda content: content["added_tokens"].append({"id": 3, "content": "</s>"}),
        lambda content: content["added_tokens"].append({"id": "x", "content": "a"}),
        lambda content: content["added_tokens"].append({"id": 3, "content": ""}),
        lambda content: content.update(added_tokens={"a": 1}),
        lambda content: content.update(normalizer=3),
        lambda content: content.update(normalizer={"type": "Sequence", "normalizers": 3}),
    ],
)
@pytest.mark.parametrize("name", ["siglip", "xlm"])
def test_forged_words_with_scores_are_refused(name: str, change: Callable[[Any], None], tmp_path: Path) -> None:
    refused(name, tmp_path, change)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.update(vocab="/etc/passwd", merges="/etc/passwd"),
        lambda model: model.update(merges="/etc/passwd"),
        lambda model: model.update(merges=[["a", "nowhere"]]),
        lambda model: model.update(merges=[["a"]]),
        lambda model: model.update(merges=[["a", "b", "c"]]),
        lambda model: model.update(merges=[1]),
        lambda model: model.update(merges=None),
        lambda model: model["vocab"].update(a=-1),
        lambda model: model["vocab"].update(a=1 << 40),
        lambda model: model["vocab"].update(a=0.5),
        lambda model: model["vocab"].update(a="b"),
        lambda model: model["vocab"].update(a=model["vocab"]["b"]),
        lambda model: model["vocab"].update({"\ud800": model["vocab"].pop("a")}),
    ],
)
def test_forged_words_and_merges_are_refused(change: Callable[[Any], None], tmp_path: Path) -> None:
    refused("gemma", tmp_path, lambda content: change(content["model"]))


def test_merges_that_undo_each_other_end(tmp_path: Path) -> None:
    config = saved("gemma", tmp_path)
    pairs = [pair.split(" ") for pair in ("a a", "aa aa", "a aa", "aa a", "a a", "aaa a", " a", "a ", " ")]

    def change(content: Any) -> None:
        vocab = content["model"]["vocab"]
        free = [word for word in vocab if word.startswith("<0x")][:4]
        for word, new in zip(free, ("aa", "aaa", "aaaa", ""), strict=True):
            vocab[new] = vocab.pop(word)
        content["model"]["merges"] = pairs * 50

    changed(tmp_path, change)
    tokens = encoded(read_tokenizer(tmp_path, config, "it"), ["a" * 5000, "a"], "it")
    assert [len(row) for row in tokens] == [64, 64]
    assert tokens[1][1:] == [1] + [0] * 62


@pytest.mark.parametrize("name", SAVED)
def test_many_added_tokens(name: str, tmp_path: Path) -> None:
    config = saved(name, tmp_path)
    size, more = config["vocab_size"], 50_000  # hours, one by one

    def change(content: Any) -> None:
        for number in range(more):
            content["added_tokens"].append(
                {"id": size + number, "content": f"<{number}>", "special": number % 2 > 0, "normalized": False}
            )

    changed(tmp_path, change)
    tokenizer = read_tokenizer(tmp_path, config | {"vocab_size": size + more}, "it")
    assert (size + 49_999 in encoded(tokenizer, ["a <49999>"], "it")[0]) == (name != "siglip")
    with pytest.raises(UserError, match=f"has {size + more} tokens and the text tower {size}"):
        read_tokenizer(tmp_path, config, "it")
