"""Learn a small CLIP-style byte-level BPE vocabulary from texts.

  python -m data_pipelines.bpe_training --texts captions.txt --vocab-size 2048 --out FOLDER

The vocabulary has CLIP's layout: 256 byte symbols, the same with `</w>`, one token per merge, then
bos and eos as the two highest ids. Every Unicode text can be encoded, by bytes where no merge fits.
"""

from __future__ import annotations

import argparse
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from data_pipelines.tokenizers import (
    BOS,
    END_OF_WORD,
    EOS,
    ClipTokenizer,
    byte_symbols,
    clean,
    merge_pair,
    split_pieces,
    word_symbols,
)

Pair = tuple[str, str]


def train_clip_bpe(texts: Iterable[str], vocab_size: int) -> ClipTokenizer:
    """A tokenizer of at most `vocab_size` tokens learnt from `texts`.

    The most frequent pair of neighbouring symbols is merged until the vocabulary is full or no pair
    occurs twice (then it is smaller). Equal counts are resolved by the pair itself, so the result
    depends on the texts only, not on their order.

    Raises:
      ValueError: `vocab_size` leaves no room for a merge (below 515).
    """
    base = [*byte_symbols().values()]
    base += [s + END_OF_WORD for s in base]
    budget = vocab_size - len(base) - 2
    if budget < 1:
        raise ValueError(
            f"vocab_size: expected at least {len(base) + 3} (byte symbols, bos, eos, one merge), "
            f"found {vocab_size}"
        )
    counts = Counter(piece for text in texts for piece in split_pieces(clean(text)))
    merges = _learn([(word_symbols(w), n) for w, n in sorted(counts.items())], budget)
    # Two merges may give the same token; it has one id.
    tokens = dict.fromkeys([*base, *(a + b for a, b in merges), BOS, EOS])
    return ClipTokenizer({token: i for i, token in enumerate(tokens)}, merges)


def _learn(words: list[tuple[list[str], int]], budget: int) -> list[Pair]:
    symbols = [list(w) for w, _ in words]
    weights = [n for _, n in words]
    totals: Counter[Pair] = Counter()
    where: defaultdict[Pair, set[int]] = defaultdict(set)
    for i, word in enumerate(symbols):
        for pair in itertools.pairwise(word):
            totals[pair] += weights[i]
            where[pair].add(i)
    merges: list[Pair] = []
    made: set[str] = set()
    while len(made) < budget and totals:
        count, best = max(((n, pair) for pair, n in totals.items()), key=lambda t: (t[0], t[1]))
        if count < 2:
            break
        made.add(best[0] + best[1])
        merges.append(best)
        for i in sorted(where.pop(best)):
            word = symbols[i]
            for pair in itertools.pairwise(word):
                totals[pair] -= weights[i]
                where[pair].discard(i)
                if totals[pair] <= 0:
                    del totals[pair]
            symbols[i] = merge_pair(word, best)
            for pair in itertools.pairwise(symbols[i]):
                totals[pair] += weights[i]
                where[pair].add(i)
    return merges


def main(arguments: list[str] | None = None) -> None:
    """Command line: one text per line in, a tokenizer folder out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--texts", type=Path, required=True, help="UTF-8 file, one text per line")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    options = parser.parse_args(arguments)
    lines = options.texts.read_text("utf-8").splitlines()
    tokenizer = train_clip_bpe(lines, options.vocab_size)
    tokenizer.save(options.out)
    print(f"{tokenizer.vocab_size} tokens from {len(lines):,} texts in {options.out}")


if __name__ == "__main__":
    main()
