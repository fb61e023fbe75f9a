"""T5's tokenizer (a SentencePiece unigram model), read from a Hugging Face folder.

As `transformers.T5Tokenizer`: text is normalised by the model's own table of characters, split at
white space, every word gets `▁` in front, and the most probable pieces are taken. A sequence is
tokens + `</s>`, padded with `<pad>`; truncation keeps `</s>` last. There is no first token.

FLUX's prompts are 512 tokens long here (256 for schnell) and 77 for CLIP's tokenizer:

    t5 = T5Tokenizer.from_folder("FLUX.1-dev/tokenizer_2").encode_batch(texts, 512)
    clip = ClipTokenizer.from_folder("FLUX.1-dev/tokenizer").encode_batch(texts, 77)

The search for pieces is done by the `tokenizers` library, which is needed only here.
"""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.tokenizers import encode_batch

UNKNOWN, EOS, PAD = "<unk>", "</s>", "<pad>"
SPACE = "▁"
_CONTROL, _UNKNOWN = 3, 2  # kinds of pieces in a SentencePiece model
_SENTINELS = 100  # `<extra_id_n>`, behind the pieces, where the folder does not say how many
_CACHED = 1 << 14


class T5Tokenizer:
    """Unigram tokenizer of one vocabulary. Thread-safe, picklable."""

    bos_id = None

    def __init__(self, backend: Any) -> None:
        """`backend`: a `tokenizers.Tokenizer` whose vocabulary has `</s>` and `<pad>`.

        Raises:
          ValueError: one of the two is missing.
        """
        missing = [t for t in (EOS, PAD) if backend.token_to_id(t) is None]
        if missing:
            raise ValueError(
                f"T5 vocabulary of {backend.get_vocab_size()} tokens: expected {EOS} and {PAD}, "
                f"{' and '.join(missing)} missing; is this a T5 tokenizer folder?"
            )
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self.eos_id: int = backend.token_to_id(EOS)
        self.pad_id: int = backend.token_to_id(PAD)
        self.vocab_size: int = max(backend.get_vocab().values()) + 1
        self._cached = functools.lru_cache(maxsize=_CACHED)(self._encode_text)

    @classmethod
    def from_folder(cls, folder: str | Path) -> T5Tokenizer:
        """Read `tokenizer.json`, or `spiece.model` where that is absent.

        Raises:
          FileNotFoundError: neither is there. ValueError: they cannot be understood.
          ImportError: the `tokenizers` library is not installed.
        """
        folder = Path(folder)
        whole, pieces = folder / "tokenizer.json", folder / "spiece.model"
        if whole.is_file():
            kind = json.loads(whole.read_text("utf-8")).get("model", {}).get("type")
            if kind != "Unigram":
                raise ValueError(f"{whole}: expected a Unigram model, found {kind!r}")
            return cls(_library().Tokenizer.from_file(str(whole)))
        if pieces.is_file():
            config = folder / "tokenizer_config.json"
            settings = json.loads(config.read_text("utf-8")) if config.is_file() else {}
            return cls(_from_pieces(pieces, int(settings.get("extra_ids", _SENTINELS))))
        raise FileNotFoundError(
            f"no T5 tokenizer in {folder}: expected tokenizer.json or spiece.model"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"backend": self._backend.to_str()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        backend = _library().Tokenizer.from_str(state["backend"])
        self.__init__(backend)  # type: ignore[misc]  # rebuilds the cache

    def tokens(self, text: str) -> tuple[int, ...]:
        """Ids of `text` without `</s>`, not truncated."""
        return self._cached(text)

    def encode_batch(self, texts: Sequence[str], length: int) -> np.ndarray:
        """Texts as int32 [len(texts), length]."""
        return encode_batch(self, texts, length)

    def files(self) -> dict[str, bytes]:
        """The Hugging Face folder of this tokenizer: file name to contents."""
        special = {"eos_token": EOS, "unk_token": UNKNOWN, "pad_token": PAD}
        config = {"tokenizer_class": "T5Tokenizer", "model_max_length": 512, **special}
        return {
            "tokenizer.json": self._backend.to_str().encode(),
            "tokenizer_config.json": json.dumps(config).encode(),
            "special_tokens_map.json": json.dumps(special).encode(),
        }

    def _encode_text(self, text: str) -> tuple[int, ...]:
        return tuple(self._backend.encode(text, add_special_tokens=False).ids)


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "T5's tokenizer needs the `tokenizers` library: pip install tokenizers"
        ) from error
    return tokenizers


def _from_pieces(file: Path, sentinels: int) -> Any:
    """The `tokenizers.Tokenizer` of a SentencePiece unigram model, as transformers builds it."""
    library = _library()
    try:
        pieces, table, unknown, kind = _read_model(file.read_bytes())
    except (ValueError, IndexError, struct.error) as error:
        raise ValueError(f"{file}: expected a SentencePiece model, found {error}") from error
    if kind != 1 or not pieces:
        raise ValueError(
            f"{file}: expected a SentencePiece unigram model, found {len(pieces)} pieces of model "
            f"type {kind}"
        )
    extra = [f"<extra_id_{n}>" for n in reversed(range(sentinels))]
    vocabulary = [(text, score) for text, score, _ in pieces] + [(t, 0.0) for t in extra]
    backend = library.Tokenizer(library.models.Unigram(vocabulary, unknown, byte_fallback=False))
    if table:
        backend.normalizer = library.normalizers.Precompiled(table)
    backend.pre_tokenizer = library.pre_tokenizers.Sequence(
        [
            library.pre_tokenizers.WhitespaceSplit(),
            library.pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always"),
        ]
    )
    special = [text for text, _, kind in pieces if kind in (_CONTROL, _UNKNOWN)]
    backend.add_special_tokens(special + extra)
    return backend


def _read_model(data: bytes) -> tuple[list[tuple[str, float, int]], bytes, int, int]:
    """(pieces with score and kind, table of the normaliser, id of unknown, type of the model) of a
    serialised `sentencepiece.ModelProto`.

    Raises:
      ValueError: not such a message.
    """
    pieces, table, unknown, model_type = [], b"", 0, 1
    for field, value in _fields(data):
        if field == 1:
            piece = dict(_fields(value))
            (score,) = struct.unpack("<f", piece.get(2, bytes(4)))
            pieces.append((piece[1].decode(), score, piece.get(3, 1)))
        elif field == 2:
            trainer = dict(_fields(value))
            unknown, model_type = trainer.get(40, 0), trainer.get(3, 1)
        elif field == 3:
            table = dict(_fields(value)).get(2, b"")
    return pieces, table, unknown, model_type


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Field numbers and values of a protocol buffer: whole numbers as int, the rest as bytes."""
    at = 0

    def number() -> int:
        nonlocal at
        value, shift = 0, 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        tag = number()
        field, wire = tag >> 3, tag & 7
        if wire == 0:
            yield field, number()
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"wire type {wire} at byte {at}")
        size = {1: 8, 5: 4}[wire] if wire != 2 else number()
        if at + size > len(data):
            raise ValueError(f"{len(data)} bytes where a field of {size} begins at byte {at}")
        yield field, data[at : at + size]
        at += size
