"""Tokenizers of language models, from a Hugging Face folder with a `tokenizer.json`.

The work is done by the `tokenizers` library (Rust), which is needed only here. Special tokens that
stand literally in a text become their ids, as in the official scripts; none are added.

`scene` is a small byte-level vocabulary of the scene world with Llama 3's special tokens and its
rule of splitting, which comes with this package. It is made by

  python -m data_pipelines.conversation.tokenizer_training \
      --out data_pipelines/conversation/tokenizer_scene
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent

BEGIN, END_OF_TEXT, END_OF_TURN = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
HEADER_START, HEADER_END = "<|start_header_id|>", "<|end_header_id|>"
IMAGE_SLOT = "<|reserved_special_token_44|>"
LLAMA3_SPECIAL = (BEGIN, END_OF_TEXT, HEADER_START, HEADER_END, END_OF_TURN, IMAGE_SLOT)


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Ids of a text, and the characters `[start, end)` that each covers."""

    ids: tuple[int, ...]
    starts: tuple[int, ...]
    ends: tuple[int, ...]


class ChatTokenizer:
    """A `tokenizers.Tokenizer` with what conversations need. Thread-safe, picklable."""

    def __init__(self, backend: Any, files: dict[str, bytes] | None = None) -> None:
        """`backend`: the tokenizer. `files`: the folder it came from, by name."""
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._files = files or {"tokenizer.json": backend.to_str().encode()}
        self._source = "tokenizer"

    @classmethod
    def from_folder(cls, folder: str | Path) -> ChatTokenizer:
        """Read `tokenizer.json`.

        Raises:
          FileNotFoundError: it is not there. ValueError: it cannot be understood.
          ImportError: the `tokenizers` library is not installed.
        """
        folder = Path(folder).expanduser()
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"no tokenizer in {folder}: expected tokenizer.json; a folder that has only "
                "tokenizer.model can be converted by loading it in transformers and saving it"
            )
        try:
            backend = library().Tokenizer.from_file(str(path))
        except ImportError:
            raise
        except Exception as error:  # the library raises bare Exception for a damaged file
            raise ValueError(f"{path}: {error}") from error
        names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
        files = {n: (folder / n).read_bytes() for n in names if (folder / n).is_file()}
        made = cls(backend, files)
        made._source = str(path)
        return made

    @property
    def vocab_size(self) -> int:
        """Rows that an embedding table needs (highest id + 1)."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    def token_id(self, token: str) -> int:
        """Id of one token. Raises ValueError when the vocabulary lacks it."""
        self.require((token,))
        return int(self._backend.token_to_id(token))

    def require(self, tokens: Iterable[str]) -> None:
        """Raise ValueError naming the `tokens` that the vocabulary lacks."""
        missing = [t for t in tokens if self._backend.token_to_id(t) is None]
        if missing:
            raise ValueError(
                f"{self._source}: the vocabulary of {self.vocab_size} tokens lacks "
                f"{', '.join(missing)}; take the tokenizer that belongs to this chat template"
            )

    def pieces(self, text: str) -> Pieces:
        """Ids of `text` with their places; no special tokens are added."""
        found = self._backend.encode(text, add_special_tokens=False)
        starts, ends = tuple(zip(*found.offsets, strict=True)) or ((), ())
        return Pieces(tuple(found.ids), starts, ends)

    def tokens(self, text: str) -> tuple[int, ...]:
        """Ids of `text`; no special tokens are added."""
        return tuple(self._backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of ids; special tokens are left out unless told otherwise."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special))

    def files(self) -> dict[str, bytes]:
        """The files of the folder that belong to the tokenizer, by name."""
        return dict(self._files)


def load_chat_tokenizer(folder: str) -> ChatTokenizer:
    """The tokenizer in `folder`, or the packaged one for "scene"."""
    return ChatTokenizer.from_folder(PACKAGE / "tokenizer_scene" if folder == "scene" else folder)


def library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "chat tokenizers need the `tokenizers` library; run `pip install tokenizers`"
        ) from error
    return tokenizers
