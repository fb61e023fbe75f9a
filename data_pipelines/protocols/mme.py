"""MME (arXiv 2306.13394) as IAA runs it: yes-or-no questions, two for each picture, 14 tasks.

Two inputs, as they are published: the benchmark's folder with its ground truth,

    MME_Benchmark_release_version/<task>/[questions_answers_YN/]<picture>.txt   question TAB Yes|No

and LLaVA's question file `llava_mme.jsonl`, one line per question:

    {"question_id": "code_reasoning/0020.png", "image": "code_reasoning/0020.png",
     "text": "... ?\\nAnswer the question using a single word or phrase.", "category": "..."}
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections import defaultdict
from pathlib import Path

from data_pipelines.batch import DataError
from data_pipelines.conversation.records import PLACEHOLDER, ConversationRecord, Turn
from data_pipelines.protocols.answers import ChatReading, answers
from data_pipelines.protocols.base import EvalResult, Functions, Metric, Protocol
from data_pipelines.protocols.features import Census, need
from data_pipelines.protocols.mme_scores import (
    COGNITION,
    PERCEPTION,
    TaskScore,
    ground_truth_key,
    score_tasks,
)
from data_pipelines.protocols.questions import settings
from data_pipelines.records import BadRecordError
from data_pipelines.sources.base import Source, files_digest
from data_pipelines.sources.fields import parse_json
from data_pipelines.sources.matching import relative_path
from data_pipelines.sources.streamed_json import Rows, open_lines

PUBLISHED = {"iaa-14": 1591.5, "iaa-8": 1581.8}  # perception, paper table 2


@dataclasses.dataclass(frozen=True)
class MmeQuestions(Source[ConversationRecord]):
    """MME's questions with their true answers; `extra` has "task" and "file".

    Attributes:
      root: the benchmark's folder, with a folder for each task. path: `llava_mme.jsonl`.
      images: folder that `image` is relative to; "" is `root`.
    """

    root: str
    path: str
    images: str = ""

    @property
    def name(self) -> str:
        return Path(self.path).stem

    @functools.cached_property
    def _rows(self) -> Rows:
        if not Path(self.path).expanduser().is_file():
            raise DataError(f"{self.path}: no such file; set source.path to llava_mme.jsonl")
        return open_lines(self.path)

    def _truth(self, task: str, stem: str) -> dict[str, str]:
        """Question to answer of one picture."""
        folder = Path(self.root).expanduser() / task
        inner = folder / "questions_answers_YN"
        file = (inner if inner.is_dir() else folder) / f"{stem}.txt"
        if not file.is_file():
            raise BadRecordError("missing_file", f"no ground truth at {file}; check source.root")
        found = {}
        for line in file.read_text("utf-8").splitlines():
            if line.strip():
                question, _, answer = line.strip().rpartition("\t")
                found[question] = answer
        return found

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> ConversationRecord:
        fields = parse_json(self._rows.read(index), f"line {index + 1}")
        try:
            number, text = str(fields["question_id"]), str(fields["text"])
            image = relative_path(str(fields["image"]))
        except KeyError as error:
            raise BadRecordError(
                "malformed_record",
                f"line {index + 1}: expected question_id, image and text, {error} is missing",
            ) from error
        task, stem = number.split("/")[0], number.split("/")[-1].split(".")[0]
        truth = self._truth(task, stem)
        key = ground_truth_key(text, truth)
        if key is None:
            raise BadRecordError(
                "unknown_question", f"{number}: {text!r:.80} is none of {list(truth)}"
            )
        folder = Path(self.images or self.root).expanduser()
        return ConversationRecord(
            number,
            (Turn("user", f"{PLACEHOLDER}\n{text}"), Turn("assistant", truth[key])),
            (folder / image,),
            {"task": task, "file": stem},
        )

    def record_id(self, index: int) -> str:
        return f"line {index + 1}"

    def fingerprint(self) -> str:
        return files_digest([Path(self.path).expanduser()])


@dataclasses.dataclass(frozen=True)
class Mme(Protocol):
    """Scores of MME. A picture of which a question could not be asked is left out and counted.

    Attributes:
      source: the questions, the two of a picture side by side.
      reading: how they are asked. function: the model's function that answers.
      model: "iaa-14" or "iaa-8" shows the published figure beside ours.
      limit: ask the first `limit` questions.
    """

    source: MmeQuestions
    reading: ChatReading
    function: str = "sample_mm"
    model: str = ""
    limit: int | None = None

    @property
    def name(self) -> str:
        return "mme"

    def requires(self) -> tuple[str, ...]:
        return (self.function,)

    def run(self, functions: Functions, *, panels: bool = False) -> EvalResult:
        del panels
        start, census = time.perf_counter(), Census()
        need(functions, self.requires(), self.name)
        pairs: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
        for found in answers(
            functions, self.function, self.source, self.reading, census, self.name, self.limit
        ):
            place = (found.record.extra["task"], found.record.extra["file"])
            pairs[place].append((found.record.turns[-1].text, found.answer))
        rows: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for (task, file), asked in pairs.items():
            if len(asked) == 2:
                rows[task] += asked
            else:
                census.drop("pictures", "one_question", f"{task}/{file}: {len(asked)} question(s)")
        census.require("pictures with both questions", len(rows), self.source)
        scores = score_tasks(rows)
        metrics = {}
        for name, tasks, most in (("perception", PERCEPTION, 2000), ("cognition", COGNITION, 800)):
            if set(tasks) <= set(scores):
                published = PUBLISHED.get(self.model) if name == "perception" else None
                total = sum(scores[task].score for task in tasks)
                # A coin gets half of the answers and a quarter of the pictures.
                metrics[name] = Metric(total, most * 0.375, published, fraction=False)
        for task in sorted(scores):
            metrics[f"score/{task}"] = Metric(scores[task].score, 75.0, fraction=False)
        every = _all(scores, rows)
        return EvalResult(
            self.name,
            {**metrics, "other": Metric(every)},
            {**settings(self.source, self.reading, self.limit), "rule": "official calculation.py"},
            sum(map(len, rows.values())),
            time.perf_counter() - start,
            (),
            dict(census.counts),
            tuple(f"{name}, first: {e}" for name, e in census.examples.items()),
        )


def _all(scores: dict[str, TaskScore], rows: dict[str, list[tuple[str, str]]]) -> float:
    """Share of answers that are neither yes nor no."""
    return sum(scores[t].other * len(r) for t, r in rows.items()) / sum(map(len, rows.values()))
