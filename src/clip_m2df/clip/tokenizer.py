"""The text tower's tokenizer: read from files or a description, checked against the tower, set to its length.

ftfy, regex, tokenizers and transformers are imported where they are used, because they take long.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os.path import exists, isfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_m2df.errors import UserError
from clip_m2df.files import check_regular, read_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# CLIP's vocabulary as OpenAI's code and all that came from it have it: a line that names it, then merges, of which the
# first 48,894 count. The checksum is that of their lines.
VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
_MERGES, _CHECKSUM = 49152 - 256 - 2, "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"
_MOST_BYTES = 1 << 22  # of the vocabulary, unpacked; CLIP's has three million
_FORMS = (["tokenizer.json"], ["vocab.json", "merges.txt"], [VOCABULARY], [VOCABULARY.removesuffix(".gz")])

# The ends of a text by CLIP's names, and what its other words are, whatever the case of letters: see `_words`.
_START, _END = "<|startoftext|>", "<|endoftext|>"
_WORD = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer, in any of its forms."""
    return _form(folder) is not None


def _form(folder: Path) -> list[str] | None:
    return next((files for files in _FORMS if all(isfile(folder / name) for name in files)), None)


def read_tokenizer(path: Path, config: Mapping[str, Any], source: str) -> Tokenizer:
    """The tokenizer of a folder, or of CLIP's vocabulary; it pads and truncates to the length of the text tower.

    The names of its files are fixed, and what a configuration says of classes and further files is not read. See
    :func:`_made` for what is taken from them.

    Args:
        path: The folder; or CLIP's vocabulary itself, compressed or not.
        config: The text tower's.
        source: Where the tokenizer comes from, for messages.

    Raises:
        UserError: There is none, it can't be read, or it is another tower's.
    """
    # Asked for one that isn't there, transformers makes one of two tokens without a word.
    files = _form(path)
    if not exists(path):
        raise UserError(f"tokenizer {path}: no such file or folder; relative names start at {Path.cwd()}")
    if files is None and not isfile(path):
        raise UserError(
            f"{path} has no tokenizer: neither tokenizer.json, nor vocab.json and merges.txt, nor {VOCABULARY}: put one"
            " there, or name it by backbone_options, tokenizer"
        )
    if files is None or files[0].startswith(VOCABULARY.removesuffix(".gz")):
        vocabulary = _read_vocabulary(path if files is None else path / files[0])
        return fitted(_made(vocabulary, {}), config, source)
    with _in_words(f"the tokenizer in {path} can't be read"):
        special = {}
        if (path / "tokenizer_config.json").exists():
            settings = json.loads(_read_own(path, "tokenizer_config.json"))
            for name in ("unk_token", "bos_token", "eos_token", "pad_token"):
                token = settings.get(name)
                if token := token.get("content") if isinstance(token, dict) else token:
                    special[name] = _text(token)
        if files == ["tokenizer.json"]:
            content = json.loads(_read_own(path, "tokenizer.json"))
        else:
            vocab = json.loads(_read_own(path, "vocab.json"))
            lines = _read_own(path, "merges.txt").splitlines()
            pairs = [line.split() for line in lines if line.strip() and not line.startswith("#version")]
            content = {"model": {"vocab": vocab, "merges": pairs}}
        tokenizer = _made(content, special)
    return fitted(tokenizer, config, source)


def _read_vocabulary(file: Path) -> dict[str, Any]:
    """CLIP's vocabulary, as the content of a ``tokenizer.json``.

    Raises:
        UserError: It can't be read, or it is not CLIP's.
    """
    check_regular(file, "vocabulary")
    try:
        with file.open("rb") as packed:
            is_packed = packed.read(2) == b"\x1f\x8b"
            packed.seek(0)
            text = (gzip.GzipFile(fileobj=packed) if is_packed else packed).read(_MOST_BYTES)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"the vocabulary {file} can't be read: {error}; fetch it again") from error
    lines = text.splitlines()[1 : 1 + _MERGES]
    if hashlib.sha256(b"\n".join(lines)).hexdigest() != _CHECKSUM:
        raise UserError(
            f"the vocabulary {file} is damaged, or not CLIP's: give {VOCABULARY} as OpenAI's code comes with it, or a "
            "folder with a tokenizer"
        )
    merges = [line.decode().split(" ") for line in lines]
    # The 256 bytes: as the character of that number if it can be seen, the others by those from 256 on.
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [*map(chr, seen), *(chr(256 + n) for n in range(256 - len(seen)))]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), _START, _END]
    return {"model": {"vocab": {word: number for number, word in enumerate(words)}, "merges": merges}}


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

    How CLIP cleans and cuts texts is known (see :func:`_words`): the file's own regular expressions, replacements and
    templates, which may take any time and memory, are not read.
    """
    from tokenizers import AddedToken
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    vocab = {_text(word): number for word, number in content["model"]["vocab"].items()}
    merges, added = content["model"]["merges"], content.get("added_tokens") or []
    pairs: Any = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]
    # Folders of OpenCLIP's models pad with "!", whose number is 0: as a token it would be taken out of texts.
    if (pad := special.get("pad_token")) in vocab and len(pad) == 1:
        special = {**special, "pad_token": special.get("eos_token", _END)}
        added = [token for token in added if token["content"] != pad]
    made = CLIPTokenizer(vocab=vocab, merges=pairs, **special)
    tokenizer: Tokenizer = made.backend_tokenizer
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    for token in sorted(added, key=lambda token: token["id"]):
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
        words = list(_words(tokenizer, texts))
        return [encoding.ids for encoding in tokenizer.encode_batch(words, is_pretokenized=True)]


def _words(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[list[str]]:
    """Clean texts and cut them into words, as CLIP had its texts in training.

    What looks wrongly decoded is mended, HTML's entities are resolved (also those of entities), and letters are small
    ones. Blanks need no cleaning, since they only part words. transformers' tokenizer does none of the first two,
    composes Unicode, and takes an end of text wherever it stands; to CLIP it is punctuation where it follows some.

    Args:
        tokenizer: A folder's may have tokens of its own beside the two ends; they are taken wherever they stand.
        texts: The texts.
    """
    import ftfy
    import regex

    tokens = {token.content.lower(): token.content for token in tokenizer.get_added_tokens_decoder().values()}
    marks = {token: regex.escape(token) for token in sorted(tokens, key=len, reverse=True)}
    own = "|".join(mark for token, mark in marks.items() if token not in (_START, _END))
    word = regex.compile("|".join([*marks.values(), _WORD]), regex.IGNORECASE)
    for text in texts:
        text = html.unescape(html.unescape(ftfy.fix_text(text))).lower()
        pieces = regex.split(f"({own})", text, flags=regex.IGNORECASE) if own else [text]
        yield [tokens.get(found, found) for piece in pieces for found in word.findall(piece)]


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
