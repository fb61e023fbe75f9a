"""LLaVA's conversation files: one JSON array (or JSON lines) of conversations and a picture folder.

    {"id": "000000033471", "image": "coco/train2017/000000033471.jpg",
     "conversations": [{"from": "human", "value": "<image>\\nWhat are the colors of the bus?"},
                       {"from": "gpt", "value": "The bus is white and red."}]}

`image` is absent for text alone, or a list for several pictures.
"""

from __future__ import annotations

import array
import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipelines.batch import DataError
from data_pipelines.conversation.records import ConversationRecord, Role, Turn
from data_pipelines.records import BadRecordError
from data_pipelines.sources.base import ListFile, Source, files_digest, spread
from data_pipelines.sources.fields import parse_json, sequence, strings
from data_pipelines.sources.matching import check_match, relative_path
from data_pipelines.sources.streamed_json import iter_elements, open_lines

_ROLES: dict[str, Role] = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LlavaJson(ListFile, Source[ConversationRecord]):
    """Conversations in LLaVA's layout (LLaVA-Pretrain, LLaVA-Instruct, own data).

    Attributes:
      path: the `.json` (one array) or `.jsonl` file.
      root: folder that `image` is relative to; "" is the folder of `path`.
      task: written to each record's `extra["task"]` (which workflow learns from it).
      min_match: share of pictures that must exist (of `checked` records); pictures missing beyond
        that are quarantined one by one.
      checked: records, spread over the file, whose pictures are looked for at opening.
    """

    task: str = "MM"
    min_match: float = 0.5
    checked: int = 1000

    @functools.cached_property
    def _spans(self) -> tuple[array.array[int], array.array[int]] | None:
        """Offsets and lengths of the elements of a JSON array; None for JSON lines."""
        path = Path(self.path).expanduser()
        if path.suffix == ".jsonl":
            return None
        if not path.is_file():
            raise DataError(f"{self.path}: no such file; set data.source.path")
        offsets, lengths = array.array("q"), array.array("q")
        for element in iter_elements(path):
            if element.key == "":
                offsets.append(element.offset)
                lengths.append(element.length)
        if not offsets:
            raise DataError(
                f"{self.path}: expected one array of conversations, found none; is this LLaVA's "
                "layout?"
            )
        return offsets, lengths

    @functools.cached_property
    def _opened(self) -> bool:
        """Looks at a spread of records once."""
        picks = spread(self._count(), self.checked)
        matched = total = 0
        unmatched = ""
        for index in picks:
            try:
                pictures = self._pictures(self._fields(index))
            except BadRecordError:
                continue
            for picture in pictures:
                total += 1
                if picture.is_file():
                    matched += 1
                elif not unmatched:
                    unmatched = str(picture.relative_to(self.folder))
        check_match(
            matched, total, self.min_match, path=unmatched, root=self.folder, field="data.root"
        )
        return True

    @functools.cached_property
    def _rows(self) -> Any:
        return open_lines(self.path)

    def _count(self) -> int:
        return len(self._rows) if self._spans is None else len(self._spans[0])

    def _fields(self, index: int) -> dict[str, Any]:
        if self._spans is None:
            return parse_json(self._rows.read(index), f"line {index + 1}")
        with open(Path(self.path).expanduser(), "rb") as file:
            file.seek(self._spans[0][index])
            return parse_json(file.read(self._spans[1][index]), f"record {index + 1}")

    def _pictures(self, fields: Mapping[str, Any]) -> tuple[Path, ...]:
        return tuple(
            self.folder / relative_path(name)
            for name in strings(fields.get("image"), "image")
            if name
        )

    def __len__(self) -> int:
        assert self._opened
        return self._count()

    def __getitem__(self, index: int) -> ConversationRecord:
        fields = self._fields(index)
        turns = tuple(_turn(t) for t in sequence(fields.get("conversations"), "conversations"))
        while (
            turns and turns[0].role != "user"
        ):  # as the official code: a leading answer is skipped
            turns = turns[1:]
        return ConversationRecord(
            id=str(fields.get("id", self.record_id(index))),
            turns=turns,
            images=self._pictures(fields),
            extra={"task": self.task},
        )

    def record_id(self, index: int) -> str:
        return f"record {index + 1}"

    def fingerprint(self) -> str:
        return files_digest([Path(self.path).expanduser()], self.task)


def _turn(value: Any) -> Turn:
    if not isinstance(value, Mapping):
        raise BadRecordError(
            "malformed_record", f"conversations: expected objects, found {value!r:.60}"
        )
    sender, text = value.get("from"), value.get("value")
    role = _ROLES.get(sender) if isinstance(sender, str) else None
    if role is None or not isinstance(text, str):
        raise BadRecordError(
            "malformed_record",
            "conversations: expected from=human or gpt and a text value, found "
            f"from={sender!r:.40}, value of type {type(text).__name__}",
        )
    return Turn(role, text)
