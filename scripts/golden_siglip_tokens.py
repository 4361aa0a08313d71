"""Write tests/golden/siglip_tokens.npz: the tokens that transformers' ``SiglipTokenizer`` makes of 2,000 prompts.

    python -m pip install sentencepiece==0.2.3 protobuf transformers==5.23.0
    python scripts/golden_siglip_tokens.py

SentencePiece trains a small tokenizer with the settings of SigLIP's own: Unigram with nmt_nfkc, ``<pad>``, ``</s>`` and
``<unk>`` first. transformers' ``T5Tokenizer`` makes its ``tokenizer.json``, in the layout of that in SigLIP's
repositories.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import sentencepiece
from transformers import SiglipTokenizer, T5Tokenizer

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"
WORDS, LENGTH = 450, 64


def main() -> None:
    """Write ``tokenizer``, the text of tokenizer.json, and ``tokens`` (n, 64) of the prompts in tokens.npz."""
    with np.load(GOLDEN / "tokens.npz") as golden:
        text = golden["prompts"].tobytes().decode(errors="surrogatepass")
    prompts = [prompt.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for prompt in json.loads(text)]
    with TemporaryDirectory() as folder:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(prompt.lower() for prompt in prompts if max(prompt, default="") < "\u3000"),
            model_prefix=f"{folder}/spiece",
            vocab_size=WORDS,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            num_threads=1,
            minloglevel=2,
        )
        reference = SiglipTokenizer(f"{folder}/spiece.model")
        tokens = reference(prompts, padding="max_length", truncation=True, max_length=LENGTH)["input_ids"]
        T5Tokenizer.from_pretrained(folder, extra_ids=0).save_pretrained(folder)
        tokenizer = Path(folder, "tokenizer.json").read_bytes()
    np.savez_compressed(
        GOLDEN / "siglip_tokens.npz",
        tokenizer=np.frombuffer(tokenizer, dtype=np.uint8),
        tokens=np.array(tokens, dtype=np.int32),
    )


if __name__ == "__main__":
    main()
