"""The text tower's tokenizer: read from files or a description, checked against the tower, set to its length.

There are CLIP's, and three that SentencePiece trained: Gemma's, as SigLIP 2 has it, SigLIP's, and XLM-RoBERTa's form,
in which MetaCLIP 2 has XLM-V's words. Of their files words, scores, merges and added tokens are read; how each cleans,
cuts and ends its texts is written here.

ftfy, regex, tokenizers and transformers are imported where they are used, because they take long.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import math
import string
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from os.path import commonprefix, exists, isfile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unicodedata import normalize

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
# SentencePiece's own files, which are not read, and what makes a tokenizer.json of them.
_CONVERSIONS = {
    "spiece.model": "T5Tokenizer.from_pretrained(FOLDER, extra_ids=0).save_pretrained(FOLDER)",
    "sentencepiece.bpe.model": "XLMRobertaTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)",
    "tokenizer.model": "",
}

# The ends of a text by CLIP's names, and what its other words are, whatever the case of letters: see `_words`.
_START, _END = "<|startoftext|>", "<|endoftext|>"
_WORD = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

_BLANK = "\u2581"  # what SentencePiece has in the place of a blank
_MOST_NODES = 1 << 24  # of the tree in which scored words are looked up; a node takes some 280 bytes of memory
_PUNCTUATION = dict.fromkeys(map(ord, string.punctuation))
_LONGEST = 64  # bytes that a character may become; NFKC's longest, of U+FDFA, are 33


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
    if not _is_clips(config) and files != ["tokenizer.json"]:
        other = next((name for name in _CONVERSIONS if isfile(path / name)), "")
        only, how = f", only SentencePiece's {other}, which is not read" if other else "", _CONVERSIONS.get(other)
        made = f"; transformers, sentencepiece and protobuf make it by {how}" if how else ""
        raise UserError(
            f"{path} has no tokenizer.json{only}: put that of the model's repository there, or name a folder with it by"
            f" backbone_options, tokenizer{made}"
        )
    if files is None and not isfile(path):
        raise UserError(
            f"{path} has no tokenizer: neither tokenizer.json, nor vocab.json and merges.txt, nor {VOCABULARY}: put one"
            " there, or name it by backbone_options, tokenizer"
        )
    if files is None or files[0].startswith(VOCABULARY.removesuffix(".gz")):
        vocabulary = _read_vocabulary(path if files is None else path / files[0])
        return fitted(_made(vocabulary, {}, config, source), config, source)
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
        tokenizer = _made(content, special, config, source)
    if config.get("kind") == "siglip" and tokenizer.padding:
        given, pad = special.get("pad_token"), tokenizer.padding["pad_token"]
        if given not in (None, pad):
            raise UserError(
                f"the tokenizer_config.json in {path} has the pad_token {given!r:.80}, and SigLIP's text towers were"
                f" trained with {pad!r}: write that there"
            )
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
        special = {name: _text(token) for name, token in special.items() if token}
        tokenizer = _made(content, special, config, source)
    return fitted(tokenizer, config, source)


def _made(content: Mapping[str, Any], special: Mapping[str, str], config: Mapping[str, Any], source: str) -> Tokenizer:
    """The tokenizer with the words, scores, merges and added tokens of a ``tokenizer.json``.

    How texts are cleaned, cut and ended is known of each tokenizer: the file's own regular expressions, replacements
    and templates, which may take any time and memory, are not read.

    Args:
        content: The content of the file.
        special: The names of CLIP's special tokens; those of the other tokenizers are fixed.
        config: The text tower's.
        source: Where the tokenizer comes from, for messages.

    Raises:
        UserError: It is a tokenizer of another kind or size than the tower's, or it lacks a token.
    """
    from tokenizers import AddedToken

    model, added = content["model"], content.get("added_tokens") or []
    scored = isinstance(model["vocab"], list) and len(model["vocab"]) > 0
    if _is_clips(config) and scored:
        raise UserError(f"the tokenizer of {source} has words with scores, which CLIP's has not: give the tower's own")
    if _is_clips(config) or not (scored or model.get("byte_fallback") or config["kind"] == "siglip"):
        tokenizer, added = _clips(model, added, special)
    else:
        tokenizer = _sentencepiece(content, added, config, source)
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    added = sorted(added, key=lambda token: token["id"])
    # All at once, for each call makes the table of all of them anew.
    tokenizer.add_tokens(
        [AddedToken(_text(token["content"]), **{flag: bool(token.get(flag)) for flag in flags}) for token in added]
    )
    for token in added:
        if tokenizer.token_to_id(token["content"]) != token["id"]:
            raise ValueError(f"the token {token['content']!r} can't have the number {token['id']}")
    return tokenizer


def _is_clips(config: Mapping[str, Any]) -> bool:
    """Whether a text tower is CLIP's; in earlier versions none had a kind."""
    return bool(config.get("kind", "vit") == "vit")


def _clips(model: Mapping[str, Any], added: Any, special: Mapping[str, str]) -> tuple[Tokenizer, Any]:
    """CLIP's tokenizer, which takes texts in words (see :func:`_words`), and the tokens to add to it."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    vocab = {_text(word): number for word, number in model["vocab"].items()}
    # Folders of OpenCLIP's models pad with "!", whose number is 0: as a token it would be taken out of texts.
    if (pad := special.get("pad_token")) in vocab and len(pad) == 1:
        special = {**special, "pad_token": special.get("eos_token", _END)}
        added = [token for token in added if token["content"] != pad]
    made = CLIPTokenizer(vocab=vocab, merges=_merges(model), **special)
    tokenizer: Tokenizer = made.backend_tokenizer
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    return tokenizer, added


def _merges(model: Mapping[str, Any]) -> Any:
    return [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]


def _sentencepiece(content: Mapping[str, Any], added: Any, config: Mapping[str, Any], source: str) -> Tokenizer:
    """A tokenizer that SentencePiece trained: Gemma's of words and merges, SigLIP's and XLM-V's of words with scores.

    Gemma's texts are lower-cased, as SigLIP 2 had them: transformers' ``Siglip2Tokenizer``. What becomes of SigLIP's,
    :func:`encoded` says. XLM-V's, which most of MetaCLIP 2 has, is known by its first word: ``XLMRobertaTokenizer``.
    """
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import BPE, Unigram
    from tokenizers.normalizers import Lowercase, Precompiled, Replace, Sequence, Strip
    from tokenizers.pre_tokenizers import Metaspace, WhitespaceSplit
    from tokenizers.pre_tokenizers import Sequence as Steps
    from tokenizers.processors import TemplateProcessing

    model, kind = content["model"], config["kind"]
    vocab = model["vocab"]
    words = [_text(entry[0]) for entry in vocab] if isinstance(vocab, list) else [_text(word) for word in vocab]
    new = {_text(token["content"]) for token in added}.difference(words)
    _check_size(len(words) + len(new), config, source)  # before anything of that size is made
    merged, xlm = isinstance(vocab, dict), words[0] == "<s>"
    if merged:
        ends, pad = ["$A", "<eos>"], "<pad>"
    else:
        ends, pad = (["<s>", "$A", "</s>"], "<pad>") if xlm else (["$A", "</s>"], "</s>")
    if kind == "siglip" and xlm:
        raise UserError(
            f"the tokenizer of {source} has <s> for its first token, as none of SigLIP's has: give the tower's"
        )
    if missing := {*ends, pad, "<unk>"}.difference([*words, "$A"]):
        raise UserError(
            f"the tokenizer of {source} has no {min(missing)}, as that of a tower of the kind {kind} has: give the one"
            " that the tower was trained with"
        )
    if merged:
        if sorted(vocab.values()) != list(range(len(vocab))):
            raise ValueError("the number of a word is missing, or there twice")
        tokenizer = Tokenizer(BPE(vocab, _merges(model), unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        tokenizer.normalizer = Sequence([Lowercase(), Replace(" ", _BLANK)])
    else:
        scores = [score for _, score in vocab]
        _check_scored(words, scores)
        tokenizer = Tokenizer(Unigram(list(zip(words, scores, strict=True)), words.index("<unk>"), False))
        charsmap = _charsmap(content.get("normalizer"))
        normalizers: list[Any] = [Precompiled(charsmap)] if charsmap else []
        if xlm:
            tokenizer.pre_tokenizer = Steps([WhitespaceSplit(), Metaspace(_BLANK, "always")])
        else:
            normalizers += [Replace(Regex(" {2,}"), " "), Strip()]  # of blanks that the table of characters makes
            tokenizer.pre_tokenizer = Metaspace(_BLANK, "always")
        tokenizer.normalizer = Sequence(normalizers)
    marks = [(end, tokenizer.token_to_id(end)) for end in ends if end != "$A"]
    tokenizer.post_processor = TemplateProcessing(single=ends, special_tokens=marks)
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(pad), pad_token=pad)
    return tokenizer


def _check_scored(words: Sequence[str], scores: Sequence[Any]) -> None:
    """Refuse words with scores that make no table, or one that takes more memory than any tokenizer's.

    Raises:
        ValueError: What is wrong with them.
    """
    if not all(type(score) in (int, float) and math.isfinite(score) for score in scores):
        raise ValueError("a score is no finite number")
    if not all(words):
        raise ValueError("a word is empty")
    packed = [word.encode() for word in words]
    if sum(map(len, packed)) > _MOST_NODES:
        packed.sort()
        nodes = sum(len(pair[1]) - len(commonprefix(pair)) for pair in pairwise([b"", *packed]))  # noqa: RUF071
        if nodes > _MOST_NODES:
            raise ValueError(f"its words make a tree of {nodes} nodes, and {_MOST_NODES} are the most")


def _charsmap(normalizer: Any) -> bytes | None:
    """SentencePiece's table of what each character becomes, such as NFKC's, where a file has one.

    Raises:
        ValueError: It is damaged, or makes a long text of a short one.
    """
    steps = normalizer.get("normalizers", [normalizer]) if normalizer else []
    packed = next((step["precompiled_charsmap"] for step in steps if step["type"] == "Precompiled"), None)
    if not packed:
        return None
    charsmap = base64.b64decode(packed, validate=True)
    # The size of a tree in four bytes, the tree, and texts that end with a NUL.
    start = 4 + int.from_bytes(charsmap[:4], "little")
    if not 4 < start <= len(charsmap) or start % 4:
        raise ValueError("its table of characters is damaged")
    if max(map(len, charsmap[start:].split(b"\0"))) > _LONGEST:
        raise ValueError(f"its table of characters makes more than {_LONGEST} bytes of one character")
    return charsmap


def fitted(tokenizer: Tokenizer, config: Mapping[str, Any], source: str) -> Tokenizer:
    """Hold a tokenizer against its text tower, and set it to the tower's length.

    Args:
        tokenizer: It is changed.
        config: The text tower's.
        source: Where the tokenizer comes from, for messages.

    Raises:
        UserError: It is another tower's.
    """
    size, expected, length = tokenizer.get_vocab_size(), config["vocab_size"], config["max_position_embeddings"]
    _check_size(size, config, source)
    if (last := max(tokenizer.get_vocab().values())) != size - 1:
        raise UserError(f"the tokenizer of {source} has {size} tokens, but numbers up to {last}: it is damaged")
    padding = tokenizer.padding
    tokenizer.no_padding()
    tokenizer.no_truncation()
    ids = encoded(tokenizer, [""], source)[0]
    end = config.get("eos_token_id", ids[-1] if ids else None)  # of a tower that pools the last token, any
    if _is_clips(config) and end == 2:
        # Such a tower takes the largest id of a text, for OpenAI's configurations say 2 wrongly.
        end = expected - 1
    if ids[-1:] != [end]:
        raise UserError(f"the tokenizer of {source} makes {ids} of an empty text, where {end} has to be the last")

    tokenizer.enable_truncation(length)
    # What follows the end of text is never read by CLIP: attention is causal, and the first end of text is the one
    # pooled. SigLIP's towers were trained on the tokens that fill a text up, and pool the last.
    pad = end if padding is None else padding["pad_id"]
    tokenizer.enable_padding(length=length, pad_id=pad, pad_token=tokenizer.id_to_token(pad))
    return tokenizer


def _check_size(size: int, config: Mapping[str, Any], source: str) -> None:
    # The size also gives away a tokenizer of two tokens that was saved to a folder.
    if size != (expected := config["vocab_size"]):
        raise UserError(
            f"the tokenizer of {source} has {size} tokens and the text tower {expected}: give the one that it was "
            "trained with"
        )


def encoded(tokenizer: Tokenizer, texts: Sequence[str], source: str) -> list[list[int]]:
    """The numbers of some texts' tokens.

    Raises:
        UserError: The tokenizer fails at them, as one with a regular expression does that never comes to an end.
    """
    from tokenizers.pre_tokenizers import Metaspace

    with _in_words(f"the tokenizer of {source} fails at a text"):
        if tokenizer.normalizer is None:  # CLIP's
            words = list(_words(tokenizer, texts))
            return [encoding.ids for encoding in tokenizer.encode_batch(words, is_pretokenized=True)]
        # Halves of pairs that UTF-16 has, of which UTF-8 knows nothing.
        texts = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts]
        if isinstance(tokenizer.pre_tokenizer, Metaspace):
            texts = _canonical(tokenizer, texts)
        return [encoding.ids for encoding in tokenizer.encode_batch(texts)]


def _canonical(tokenizer: Tokenizer, texts: Sequence[str]) -> list[str]:
    """Texts as SigLIP had them in training: lower-cased, without ASCII's punctuation, with one blank between words.

    So a special token in a text is no token, as it is to transformers' ``SiglipTokenizer``. Letters with several marks
    are composed, of which the library's table of characters would leave out the second mark.
    """
    import regex
    from tokenizers.normalizers import Precompiled

    texts = [" ".join(text.replace(_BLANK, " ").lower().translate(_PUNCTUATION).split()) for text in texts]
    if isinstance(tokenizer.normalizer[0], Precompiled):
        texts = [regex.sub(r"\P{M}\p{M}+", lambda found: normalize("NFKC", found[0]), text) for text in texts]
    return texts


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
