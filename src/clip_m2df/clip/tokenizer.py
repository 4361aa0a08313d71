"""The text tower's tokenizer: read from a folder, checked against the tower, set to its length.

tokenizers and transformers are imported where they are used, because they take long.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_m2df.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer, in either of its forms."""
    forms = (["tokenizer.json"], ["vocab.json", "merges.txt"])
    return any(all((folder / name).is_file() for name in files) for files in forms)


def read_tokenizer(folder: Path, config: Mapping[str, Any], source: str) -> Tokenizer:
    """The tokenizer of a folder, which pads and truncates to the length of the text tower.

    It is the bare one, without transformers around it: it does all that is needed, and one string rebuilds it.

    Args:
        folder: Where it lies.
        config: The text tower's.
        source: Where the tokenizer comes from, for messages.

    Raises:
        UserError: There is none, it can't be read, or it is another tower's.
    """
    from tokenizers import Tokenizer
    from transformers import CLIPTokenizer

    # Asked for one that isn't there, transformers makes one of two tokens without a word.
    if not has_tokenizer(folder):
        raise UserError(f"{folder} has no tokenizer: neither tokenizer.json, nor vocab.json and merges.txt")
    try:
        whole = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        tokenizer = Tokenizer.from_str(whole.backend_tokenizer.to_str())
    except Exception as error:  # whatever a damaged file leads to
        raise UserError(f"the tokenizer in {folder} can't be read: {error}") from error

    # The size also gives away a tokenizer of two tokens that was saved to a folder.
    size, expected, length = tokenizer.get_vocab_size(), config["vocab_size"], config["max_position_embeddings"]
    if size != expected:
        raise UserError(
            f"the tokenizer of {source} has {size} tokens and the text tower {expected}: give the one that it was "
            "trained with"
        )
    # A tower whose end of text is 2 takes the largest id of a text, for OpenAI's configurations say 2 wrongly.
    end = config["eos_token_id"] if config["eos_token_id"] != 2 else expected - 1
    ids = tokenizer.encode("").ids
    if ids[-1:] != [end]:
        raise UserError(f"the tokenizer of {source} makes {ids} of an empty text, where {end} has to be the last")

    tokenizer.enable_truncation(length)
    # What follows the end of text is never read: attention is causal, and the first end of text is the one pooled.
    tokenizer.enable_padding(length=length, pad_id=end, pad_token=tokenizer.id_to_token(end))
    return tokenizer
