"""The packaged tokenizer of the scene world's conversations, and how it is made.

  python -m data_pipelines.conversation.tokenizer_training \
      --out data_pipelines/conversation/tokenizer_scene
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from data_pipelines.conversation.scenes import tokenizer_texts
from data_pipelines.conversation.tokenizer import LLAMA3_SPECIAL, ChatTokenizer, library

# How Llama 3 cuts a text into pieces that merges stay within (its tokenizer.json).
_LLAMA3_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def learn_tokenizer(texts: Iterable[str], vocab_size: int) -> ChatTokenizer:
    """Byte-level BPE learnt from `texts`, with Llama 3's pieces and special tokens (first ids)."""
    tokenizers = library()
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(_LLAMA3_PIECES), behavior="isolated")
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, level])
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(LLAMA3_SPECIAL),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return ChatTokenizer(backend)


def main() -> None:
    """Make the packaged tokenizer."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=400)
    parser.add_argument("--vocab-size", type=int, default=768)
    options = parser.parse_args()
    made = learn_tokenizer(tokenizer_texts(options.scenes), options.vocab_size)
    options.out.mkdir(parents=True, exist_ok=True)
    compact = json.dumps(json.loads(made.files()["tokenizer.json"]), ensure_ascii=False)
    (options.out / "tokenizer.json").write_text(compact + "\n", "utf-8")


if __name__ == "__main__":
    main()
