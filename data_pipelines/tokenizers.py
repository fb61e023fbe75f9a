"""CLIP's byte-level BPE, read from a Hugging Face folder, without transformers at run time.

Rules (spec section 5, equal to `transformers.CLIPTokenizer`): literal special tokens in the text
keep their ids; the rest is NFC-normalised, whitespace runs become one space, lower-cased, split
into contractions, letter runs, single digits and runs of anything else; the UTF-8 bytes of each
piece go through GPT-2's byte-to-unicode table, its last symbol gets `</w>`, and merges apply lowest
rank first. A sequence is bos + tokens + eos, padded with eos; truncation keeps eos last.
"""

from __future__ import annotations

import functools
import itertools
import json
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import regex

BOS = "<|startoftext|>"
EOS = "<|endoftext|>"
END_OF_WORD = "</w>"

# Unicode White_Space, written out: Python's \s also takes the separators U+001C..U+001F.
_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_SPACES = regex.compile(f"[{_SPACE}]+")
_PIECES = regex.compile(rf"'s|'t|'re|'ve|'m|'ll|'d|\p{{L}}+|\p{{N}}|[^{_SPACE}\p{{L}}\p{{N}}]+")
_SPECIAL = regex.compile(r"(<\|startoftext\|>|<\|endoftext\|>)")
_CACHED = 1 << 16  # words and phrases each
_PHRASE = 80  # texts up to this many characters are likely to come again


class Tokenizer(Protocol):
    """What pipelines and protocols need of a tokenizer."""

    @property
    def bos_id(self) -> int | None: ...  # None: sequences have no first token
    @property
    def eos_id(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...

    def tokens(self, text: str) -> Sequence[int]:
        """Ids of `text` without bos and eos, not truncated."""
        ...


def encode(tokenizer: Tokenizer, text: str, length: int) -> tuple[np.ndarray, int]:
    """One text as int32 [length] (bos, tokens, eos, padding), and how many tokens were cut.

    Too long a text keeps its first tokens, as many as fit; eos stays last. bos is left out where
    the tokenizer has none.
    """
    rows, cut = encode_rows(tokenizer, (text,), length)
    return rows[0], cut


def encode_rows(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> tuple[np.ndarray, int]:
    """Texts as int32 [len(texts), length], and how many tokens were cut in all; see `encode`."""
    out = np.full((len(texts), length), tokenizer.pad_id, np.int32)
    start = 0
    if tokenizer.bos_id is not None:
        out[:, 0] = tokenizer.bos_id
        start = 1
    eos, room, cut = tokenizer.eos_id, length - 1 - start, 0
    for row, text in zip(out, texts, strict=True):
        ids = tokenizer.tokens(text)
        if len(ids) > room:
            cut += len(ids) - room
            ids = ids[:room]
        row[start : start + len(ids)] = ids
        row[start + len(ids)] = eos
    return out, cut


def encode_batch(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> np.ndarray:
    """Texts as int32 [len(texts), length]; see `encode`."""
    return encode_rows(tokenizer, texts, length)[0]


class ClipTokenizer:
    """CLIP BPE of one vocabulary. Immutable, thread-safe, picklable."""

    def __init__(self, vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> None:
        """`vocab`: token to id, bos and eos included. `merges`: pairs in order of rank.

        Raises:
          ValueError: a special token is missing.
        """
        missing = [t for t in (BOS, EOS) if t not in vocab]
        if missing:
            raise ValueError(
                f"CLIP vocabulary of {len(vocab)} tokens: expected {BOS} and {EOS}, "
                f"{' and '.join(missing)} missing; is this a CLIP tokenizer folder?"
            )
        self._vocab = dict(vocab)
        self._merges = tuple(merges)
        self._ranks = {pair: rank for rank, pair in enumerate(self._merges)}
        self._word = functools.lru_cache(maxsize=_CACHED)(self._encode_word)
        self._phrase = functools.lru_cache(maxsize=_CACHED)(self._encode_text)

    @classmethod
    def from_folder(cls, folder: str | Path) -> ClipTokenizer:
        """Read `vocab.json` + `merges.txt`, or `tokenizer.json` where those are absent.

        Raises:
          FileNotFoundError: neither is there. ValueError: they cannot be understood.
        """
        folder = Path(folder)
        vocab_file, merges_file = folder / "vocab.json", folder / "merges.txt"
        if vocab_file.is_file() and merges_file.is_file():
            vocab = json.loads(vocab_file.read_text("utf-8"))
            lines = merges_file.read_text("utf-8").split("\n")
            if lines and lines[0].startswith("#version"):
                lines = lines[1:]
            return cls(vocab, [_pair(line, merges_file) for line in lines if line.strip()])
        whole = folder / "tokenizer.json"
        if whole.is_file():
            data = json.loads(whole.read_text("utf-8"))
            model = data.get("model", {})
            if model.get("type") not in (None, "BPE") or "merges" not in model:
                raise ValueError(
                    f"{whole}: expected a BPE model with merges, found {model.get('type')!r}"
                )
            vocab = dict(model["vocab"])
            vocab.update({t["content"]: t["id"] for t in data.get("added_tokens", ())})
            return cls(vocab, [_pair(m, whole) for m in model["merges"]])
        raise FileNotFoundError(
            f"no CLIP tokenizer in {folder}: expected vocab.json and merges.txt, or tokenizer.json"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"vocab": self._vocab, "merges": self._merges}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["vocab"], state["merges"])  # type: ignore[misc]  # rebuilds the cache

    @property
    def bos_id(self) -> int:
        return self._vocab[BOS]

    @property
    def eos_id(self) -> int:
        return self._vocab[EOS]

    @property
    def pad_id(self) -> int:
        """Equal to eos, as FG-CLIP sets it whatever the config says (spec section 7)."""
        return self._vocab[EOS]

    @property
    def vocab_size(self) -> int:
        """Rows that an embedding table needs (highest id + 1)."""
        return max(self._vocab.values()) + 1

    def tokens(self, text: str) -> tuple[int, ...]:
        """Ids of `text` without bos and eos, not truncated."""
        return self._phrase(text) if len(text) <= _PHRASE else self._encode_text(text)

    def _encode_text(self, text: str) -> tuple[int, ...]:
        out: list[int] = []
        parts = _SPECIAL.split(text) if "<|" in text else (text,)
        for part in parts:
            if part in (BOS, EOS):
                out.append(self._vocab[part])
                continue
            for piece in _PIECES.findall(clean(part)):
                out.extend(self._word(piece))
        return tuple(out)

    def encode_batch(self, texts: Sequence[str], length: int) -> np.ndarray:
        """Texts as int32 [len(texts), length]."""
        return encode_batch(self, texts, length)

    def files(self) -> dict[str, bytes]:
        """The Hugging Face folder of this tokenizer: file name to contents."""
        merges = "".join(f"{a} {b}\n" for a, b in self._merges)
        special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}
        return {
            "vocab.json": _json_bytes(self._vocab),
            "merges.txt": ("#version: 0.2\n" + merges).encode(),
            "special_tokens_map.json": _json_bytes(special),
            "tokenizer_config.json": _json_bytes(config),
        }

    def save(self, folder: str | Path) -> None:
        """Write `files()` into `folder` (made if absent)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            (folder / name).write_bytes(content)

    def _encode_word(self, piece: str) -> tuple[int, ...]:
        symbols = word_symbols(piece)
        while len(symbols) > 1:
            rank, pair = min(
                (self._ranks.get(pair, len(self._ranks)), pair)
                for pair in itertools.pairwise(symbols)
            )
            if rank == len(self._ranks):
                break
            symbols = merge_pair(symbols, pair)
        unknown = self._vocab[EOS]  # as transformers: unk_token is <|endoftext|>
        return tuple(self._vocab.get(s, unknown) for s in symbols)


@functools.cache
def byte_symbols() -> dict[int, str]:
    """GPT-2's table from byte to a printable character, in CLIP's vocabulary order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {b: chr(b) for b in printable}
    others = (b for b in range(256) if b not in table)
    table.update({b: chr(256 + n) for n, b in enumerate(others)})
    return table


def clean(text: str) -> str:
    """NFC, whitespace runs to one space, stripped, lower case (character by character)."""
    if text.isascii():
        return _SPACES.sub(" ", text).strip(" ").lower()
    text = _SPACES.sub(" ", unicodedata.normalize("NFC", text)).strip(" ")
    # A capital sigma at the end of a word: str.lower() would look at its neighbours.
    return text.replace("Σ", "σ").lower()


def split_pieces(text: str) -> list[str]:
    """The pieces that merges stay within, of a text already `clean`."""
    return _PIECES.findall(text)


def word_symbols(piece: str) -> list[str]:
    """A piece as byte symbols, the last one marked with `</w>`."""
    table = byte_symbols()
    symbols = [table[b] for b in piece.encode("utf-8", "surrogatepass")]
    symbols[-1] += END_OF_WORD
    return symbols


def merge_pair(symbols: Sequence[str], pair: tuple[str, str]) -> list[str]:
    """`symbols` with every occurrence of `pair` joined, left to right."""
    out: list[str] = []
    i = 0
    while i < len(symbols):
        if i + 1 < len(symbols) and symbols[i] == pair[0] and symbols[i + 1] == pair[1]:
            out.append(pair[0] + pair[1])
            i += 2
        else:
            out.append(symbols[i])
            i += 1
    return out


def _pair(line: str | Sequence[str], file: Path) -> tuple[str, str]:
    parts = line.split() if isinstance(line, str) else list(line)
    if len(parts) != 2:
        raise ValueError(f"{file}: expected two symbols in each merge, found {line!r}")
    return parts[0], parts[1]


def _json_bytes(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()
