"""Learn a small CLIP-style byte-level BPE vocabulary from texts.

  python -m data_pipelines.bpe_training --texts captions.txt --vocab-size 2048 --out FOLDER

The tokenizer of the scene world that comes with the package (`tokenizer_scene/`) is made by

  python -m data_pipelines.bpe_training --scenes 3000 --vocab-size 1024 \
      --out data_pipelines/tokenizer_scene

The vocabulary has CLIP's layout: 256 byte symbols, the same with `</w>`, one token per merge, then
bos and eos as the two highest ids. Every Unicode text can be encoded, by bytes where no merge fits.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
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


def train_clip_bpe(texts: Iterable[str] | Mapping[str, int], vocab_size: int) -> ClipTokenizer:
    """A tokenizer of at most `vocab_size` tokens learnt from `texts` (or texts with counts).

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
    counts: Counter[str] = Counter()
    for text, times in Counter(texts).items():
        for piece in split_pieces(clean(text)):
            counts[piece] += times
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


def scene_texts(count: int) -> Counter[str]:
    """All texts of `count` scenes with counts. English ones weigh a million times more, so that
    every English word is a token before what is left of the vocabulary goes to Chinese."""
    from data_pipelines.scenes import Scenes

    found: Counter[str] = Counter()
    english = Scenes(count=count, image_size=16, short_captions=3)
    chinese = dataclasses.replace(english, language="zh")
    for source, times in ((english, 1_000_000), (chinese, 1)):
        for index in range(count):
            record = source[index]
            texts = [*record.short_captions, record.long_caption]
            for region in record.regions:
                texts += [region.phrase, region.long_phrase, *region.negatives]
            for text in texts:
                found[text or ""] += times
    return found


def main(arguments: list[str] | None = None) -> None:
    """Command line: texts in, a tokenizer folder out."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="example: python -m data_pipelines.bpe_training --texts captions.txt --out FOLDER",
    )
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--texts", type=Path, help="UTF-8 file, one text per line")
    given.add_argument("--scenes", type=int, metavar="N", help="texts of N scenes instead")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    options = parser.parse_args(arguments)
    if options.texts is not None:
        texts = Counter(options.texts.read_text("utf-8").splitlines())
    else:
        texts = scene_texts(options.scenes)
    tokenizer = train_clip_bpe(texts, options.vocab_size)
    tokenizer.save(options.out)
    print(f"{tokenizer.vocab_size} tokens in {options.out}")


if __name__ == "__main__":
    main()
