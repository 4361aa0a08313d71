"""The text tower's tokenizer: read from a folder or a description, checked against the tower, set to its length.

tokenizers and transformers are imported where they are used, because they take long.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_m2df.errors import UserError
from clip_m2df.files import read_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer, in either of its forms."""
    forms = (["tokenizer.json"], ["vocab.json", "merges.txt"])
    return any(all((folder / name).is_file() for name in files) for files in forms)


def read_tokenizer(folder: Path, config: Mapping[str, Any], source: str) -> Tokenizer:
    """The tokenizer of a folder, which pads and truncates to the length of the text tower.

    The names of its files are fixed, and what a configuration says of classes and further files is not read. See
    :func:`_made` for what is taken from them.

    Args:
        folder: Where it lies.
        config: The text tower's.
        source: Where the tokenizer comes from, for messages.

    Raises:
        UserError: There is none, it can't be read, or it is another tower's.
    """
    # Asked for one that isn't there, transformers makes one of two tokens without a word.
    if not has_tokenizer(folder):
        raise UserError(f"{folder} has no tokenizer: neither tokenizer.json, nor vocab.json and merges.txt")
    with _in_words(f"the tokenizer in {folder} can't be read"):
        special = {}
        if (folder / "tokenizer_config.json").exists():
            settings = json.loads(_read_own(folder, "tokenizer_config.json"))
            for name in ("unk_token", "bos_token", "eos_token", "pad_token"):
                token = settings.get(name)
                if token := token.get("content") if isinstance(token, dict) else token:
                    special[name] = _text(token)
        if (folder / "tokenizer.json").is_file():
            content = json.loads(_read_own(folder, "tokenizer.json"))
        else:
            vocab = json.loads(_read_own(folder, "vocab.json"))
            lines = _read_own(folder, "merges.txt").splitlines()
            pairs = [line.split() for line in lines if line.strip() and not line.startswith("#version")]
            content = {"model": {"vocab": vocab, "merges": pairs}}
        tokenizer = _made(content, special)
    return fitted(tokenizer, config, source)


def saved_tokenizer(text: str, config: Mapping[str, Any], source: str) -> Tokenizer:
    """The tokenizer that a description of a backbone has, such as a checkpoint's; see :func:`_made`.

    Raises:
        UserError: It can't be read, or it is another tower's.
    """
    with _in_words(f"the tokenizer of {source} can't be read"):
        content = json.loads(text)
        special = {"unk_token": content["model"].get("unk_token")}
        ends = content.get("post_processor") or {}
        for name, end in (("bos_token", "cls"), ("eos_token", "sep")):
            special[name] = ends[end][0] if end in ends else None
        tokenizer = _made(content, {name: _text(token) for name, token in special.items() if token})
    return fitted(tokenizer, config, source)


def _made(content: Mapping[str, Any], special: Mapping[str, str]) -> Tokenizer:
    """CLIP's tokenizer with the words, merges and added tokens of a ``tokenizer.json``.

    How CLIP cuts texts is known: the file's own regular expressions, replacements and templates, which may take any
    time and memory, are not read.
    """
    from tokenizers import AddedToken
    from transformers import CLIPTokenizer

    words, merges = content["model"]["vocab"].items(), content["model"]["merges"]
    pairs: Any = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]
    made = CLIPTokenizer(vocab={_text(word): number for word, number in words}, merges=pairs, **special)
    tokenizer: Tokenizer = made.backend_tokenizer
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    for token in sorted(content.get("added_tokens") or [], key=lambda token: token["id"]):
        own = AddedToken(_text(token["content"]), **{flag: bool(token.get(flag)) for flag in flags})
        tokenizer.add_special_tokens([own]) if own.special else tokenizer.add_tokens([own])
        if tokenizer.token_to_id(own.content) != token["id"]:
            raise ValueError(f"the token {own.content!r} can't have the number {token['id']}")
    return tokenizer.from_str(tokenizer.to_str())


def fitted(tokenizer: Tokenizer, config: Mapping[str, Any], source: str) -> Tokenizer:
    """Hold a tokenizer against its text tower, and set it to the tower's length.

    Args:
        tokenizer: It is changed.
        config: The text tower's.
        source: Where the tokenizer comes from, for messages.

    Raises:
        UserError: It is another tower's.
    """
    # The size also gives away a tokenizer of two tokens that was saved to a folder.
    size, expected, length = tokenizer.get_vocab_size(), config["vocab_size"], config["max_position_embeddings"]
    if size != expected:
        raise UserError(
            f"the tokenizer of {source} has {size} tokens and the text tower {expected}: give the one that it was "
            "trained with"
        )
    if (last := max(tokenizer.get_vocab().values())) != size - 1:
        raise UserError(f"the tokenizer of {source} has {size} tokens, but numbers up to {last}: it is damaged")
    # A tower whose end of text is 2 takes the largest id of a text, for OpenAI's configurations say 2 wrongly.
    end = config["eos_token_id"] if config["eos_token_id"] != 2 else expected - 1
    tokenizer.no_padding()
    tokenizer.no_truncation()
    ids = encoded(tokenizer, [""], source)[0]
    if ids[-1:] != [end]:
        raise UserError(f"the tokenizer of {source} makes {ids} of an empty text, where {end} has to be the last")

    tokenizer.enable_truncation(length)
    # What follows the end of text is never read: attention is causal, and the first end of text is the one pooled.
    tokenizer.enable_padding(length=length, pad_id=end, pad_token=tokenizer.id_to_token(end))
    return tokenizer


def encoded(tokenizer: Tokenizer, texts: Sequence[str], source: str) -> list[list[int]]:
    """The numbers of some texts' tokens.

    Raises:
        UserError: The tokenizer fails at them, as one with a regular expression does that never comes to an end.
    """
    with _in_words(f"the tokenizer of {source} fails at a text"):
        return [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]


@contextmanager
def _in_words(message: str) -> Iterator[None]:
    """Turn whatever a damaged tokenizer leads to into an error that says so."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        # The library panics at what it didn't expect, and its panic is not an Exception.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{message}: {reason}; fetch its files again") from error
        raise


def _read_own(folder: Path, name: str) -> str:
    """A file of the folder itself, or of the hub's cache that the folder is in: no link leads elsewhere."""
    file, home = (folder / name).resolve(), folder.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if home not in file.parents and file.parent != blobs:
        raise UserError(f"{folder / name} is a link to {file}: copy the file into the folder, if you trust it")
    return read_text(file, "tokenizer's file")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a token")
    return value
