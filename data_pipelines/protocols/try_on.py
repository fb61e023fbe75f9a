"""Virtual try-on: dress every person of a source, and score the pictures.

Pictures are made with a system's function `sample` or `sample_reference`, whose arrays are
described in `data_pipelines.tryon.pipeline`. (`try_on_folders` scores pictures that any program
left in a folder.) Rules of the official evaluation (spec section 6):

* Paired sets: SSIM, LPIPS, FID, KID. Unpaired sets: FID and KID only, against the persons' photos.
* The truth is brought to the generated height (Lanczos, width `int(w * height / h)`); when that
  changes it and results are JPEG, it passes through a JPEG file like the results, because the
  official script writes the smaller pictures.
* FID and KID: clean-fid's mode "clean"; KID over 100 subsets of up to 1000, times 1000.

What differs: the noise of a record comes from (seed, index of the record), so a picture does not
depend on the batch size; the official code draws the same noise for every batch.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from data_pipelines.protocols import features
from data_pipelines.protocols.base import (
    EvalResult,
    Functions,
    IncomparableError,
    Metric,
    Panel,
    Protocol,
)
from data_pipelines.protocols.features import Census
from data_pipelines.protocols.panels import try_on_sheet
from data_pipelines.protocols.picture_scores import (
    PAIRED,
    SCORES,
    Encoding,
    Networks,
    Score,
    Scores,
    encoded,
    through_file,
    to_bytes,
    to_height,
)
from data_pipelines.protocols.published import NOT_COMPARABLE
from data_pipelines.records import BadRecordError, TryOnRecord
from data_pipelines.scenes import garment_classifier
from data_pipelines.scenes.garments import FABRICS, PATTERNS
from data_pipelines.tryon.pipeline import check_sizes
from data_pipelines.tryon.source import Part, TryOnSource
from data_pipelines.tryon.transforms import Frame, pictures

Subject = Literal["person", "agnostic"]


@dataclasses.dataclass(frozen=True)
class TryOn(Protocol):
    """See the module's description.

    Attributes:
      source: what is dressed; its records say whether they are paired.
      frame: sizes of the pictures, as in training.
      subject: the model is given the person photo (mask-free) or the agnostic one.
      reference: it is given somebody else in the garment as well.
      scores: which of `SCORES`; None takes what makes sense: SSIM always for paired sets, the
        others where their networks are named. Unpaired sets have neither SSIM nor LPIPS.
      networks: files of the networks.
      encoding: how results are written before they are scored; "jpeg" is official.
      person_from_target: show the model the target where a record has no person photo, as the
        official loaders do: in a paired set it then sees the person in the right garment already.
      label: first part of the name. limit: only so many records; None for all.
      seed: of the noise. batch_size: pictures per call; best that of `Evaluation`, which pads to
        its own. examples: rows in the report.
      save: folder to write the results to, under the names of the set; "" for nowhere.
      published: (metric, value) pairs of the paper for this setting, see `try_on_published`.
      multiple: as in `TryOnPipeline`.
    """

    source: TryOnSource
    frame: Frame = Frame()  # noqa: RUF009 - frozen, so one instance serves all
    _: dataclasses.KW_ONLY
    subject: Subject = "person"
    reference: bool = False
    scores: tuple[Score, ...] | None = None
    networks: Networks = dataclasses.field(default_factory=Networks)
    encoding: Encoding = "jpeg"
    person_from_target: bool = False
    label: str = "try_on"
    limit: int | None = None
    seed: int = 42
    batch_size: int = 8
    examples: int = 6
    save: str = ""
    published: tuple[tuple[str, float], ...] = ()
    multiple: int = 16

    @property
    def name(self) -> str:
        """As "try_on_person_reference"."""
        return f"{self.label}_{self.subject}{'_reference' if self.reference else ''}"

    def requires(self) -> tuple[str, ...]:
        return ("sample_reference",) if self.reference else ("sample",)

    def check(self) -> None:
        """Also raises ValueError for sizes that cannot be, and for networks that are not there."""
        check_sizes(self.frame, self.multiple, f"{self.name}.frame")
        for field in ("batch_size", "examples"):
            if getattr(self, field) < 1:
                raise ValueError(f"{self.name}.{field}: expected 1 or more")
        unknown = [s for s in self.scores or () if s not in SCORES]
        if unknown:
            raise ValueError(
                f"{self.name}.scores: unknown {', '.join(unknown)}; known: {', '.join(SCORES)}"
            )
        self.networks.check(self.scores or (), self.name)
        if self.published and self.limit is not None:
            raise IncomparableError(
                f"{self.name}: the first {self.limit} records cannot be compared with the "
                "published figure; set limit=None or published=()"
            )
        if self.published and (self.encoding != "jpeg" or self.frame.resize != "stretch"):
            raise IncomparableError(
                f"{self.name}: the published figure is of JPEG files of stretched pictures; set "
                "encoding='jpeg', frame.resize='stretch', or published=()"
            )

    def _scores(self, paired: bool) -> tuple[Score, ...]:
        """What is scored, in the order of `SCORES`.

        Raises:
          ValueError: SSIM or LPIPS asked for without true pictures.
        """
        if self.scores is None:
            return self.networks.offered(paired)
        wrong = [s for s in self.scores if s in PAIRED and not paired]
        if wrong:
            raise ValueError(
                f"{self.name}: {', '.join(wrong)} compares a picture with its truth, and the "
                f"records of {self.source.name} are unpaired; leave it out of scores"
            )
        return tuple(s for s in SCORES if s in self.scores)

    def run(self, functions: Functions, *, panels: bool = False) -> EvalResult:
        start, census = time.perf_counter(), Census()
        features.need(functions, self.requires(), self.name)
        self.check()
        total = len(self.source) if self.limit is None else min(self.limit, len(self.source))
        shown = set(features.spread(total, self.examples)) if panels else set()
        rows = self._rows(total, census)
        first = next(rows, None)
        census.require(
            "records that have what the model is given", int(first is not None), self.source
        )
        assert first is not None
        paired = first.record.paired
        scores = self._scores(paired)
        totals, garments = Scores(scores, self.networks, self.batch_size), _Garments()
        kept: list[tuple[_Row, np.ndarray]] = []
        count, stream = 0, itertools.chain((first,), rows)
        while chunk := list(itertools.islice(stream, self.batch_size)):
            made = self._sample(functions, chunk)
            self._score(chunk, made, totals, paired)
            for row, picture in zip(chunk, made, strict=True):
                garments.add(row.record, picture)
                if self.save and jax.process_index() == 0:
                    self._write(row.record, picture)
                if row.index in shown:
                    kept.append((row, picture))
            count += len(chunk)
        published = dict(self.published)
        values = totals.result() if totals.count else {}
        metrics = {k: Metric(v, None, published.get(k), False) for k, v in values.items()}
        settings = {
            "source": self.source.name,
            "fingerprint": self.source.fingerprint(),
            "pictures": f"{self.frame.height} x {self.frame.width}",
            "conditions": "{} x {}".format(*self.frame.cond_size),
            "resize": self.frame.resize,
            "subject": self.subject,
            "reference": self.reference,
            "paired": paired,
            "scores": list(scores),
            "encoding": self.encoding,
            "seed": self.seed,
            "limit": self.limit,
        }
        if self.published:
            settings["comparable"] = count == len(self.source)
        return EvalResult(
            self.name,
            {**metrics, **garments.metrics()},
            settings,
            count,
            time.perf_counter() - start,
            (_panel(kept),) if kept else (),
            {k: v for k, v in census.counts.items() if v},
            self._notes(census, count),
        )

    def _score(self, chunk: Sequence[_Row], made: np.ndarray, totals: Scores, paired: bool) -> None:
        """Add a batch to the scores, as far as its records have a truth."""
        if any(row.record.paired != paired for row in chunk):
            raise ValueError(
                f"{self.source.name}: expected paired or unpaired records, found both; evaluate "
                "them apart"
            )
        pairs = [
            (row.truth, through_file(picture, self.encoding), row.record.category or "other")
            for row, picture in zip(chunk, made, strict=True)
            if row.truth is not None
        ]
        if pairs:
            truth, written, groups = zip(*pairs, strict=True)
            totals.add(np.stack(truth), np.stack(written), groups)

    def _notes(self, census: Census, count: int) -> tuple[str, ...]:
        notes = [f"{name}, first: {e}" for name, e in census.examples.items()]
        if self.published and count != len(self.source):
            notes.append(
                f"{NOT_COMPARABLE}: {count} of {len(self.source)} records could be evaluated"
            )
        if census.counts["subject_is_target"]:
            notes.append(
                "the model was shown the target photo itself where a record has no person photo "
                "(person_from_target)"
            )
        if census.counts["truth_stretched"]:
            notes.append(
                "true pictures of another aspect ratio than the generated ones were stretched to "
                "them; the official script cannot score such pictures"
            )
        return tuple(notes)

    def _rows(self, total: int, census: Census) -> Iterator[_Row]:
        """Usable records in order with what the model takes; the rest is counted."""
        for index in tqdm(range(total), desc=self.name, unit="picture", leave=False, disable=None):
            census.counts["records_seen"] += 1
            try:
                record = self.source[index]
                arrays = pictures(record, self.frame, ("target", self.subject, "reference"))
                subject = arrays.get(self.subject)
                if subject is None and self.subject == "person" and self.person_from_target:
                    subject = arrays.get("target")
                    census.counts["subject_is_target"] += subject is not None
                reference = arrays.get("reference")
                if subject is None:
                    self._refuse(self.subject)
                if self.reference and reference is None:
                    self._refuse("reference")
                truth = self._truth(record, arrays, census)
            except BadRecordError as e:
                where = f"{self.source.name}:{self.source.record_id(index)}: {e.detail}"
                census.drop("records", e.reason, where)
                continue
            assert subject is not None
            yield _Row(index, record, {**arrays, "subject": subject}, truth)

    def _refuse(self, part: Part) -> None:
        raise BadRecordError(
            f"missing_{part}", f"no {part} photo; looked for in {self.source.looked_for(part)}"
        )

    def _truth(
        self, record: TryOnRecord, arrays: Mapping[str, np.ndarray], census: Census
    ) -> np.ndarray | None:
        """The true picture as it is scored, uint8 [H, W, 3]."""
        if record.target is None:
            return None
        target = self.frame.decode(record.target)
        scaled = to_height(target, self.frame.height)
        if scaled.width != self.frame.width or self.frame.resize != "stretch":
            census.counts["truth_stretched"] += self.frame.resize == "stretch"
            return arrays["target"]
        changed = scaled is not target
        return through_file(np.asarray(scaled), self.encoding if changed else "png")

    def _sample(self, functions: Functions, chunk: Sequence[_Row]) -> np.ndarray:
        """Pictures uint8 [n, H, W, 3] of the rows; the last batch is padded and cut again."""
        padded = [*chunk, *[chunk[-1]] * (self.batch_size - len(chunk))]
        names = ("subject", "garment", *(("reference",) if self.reference else ()))
        arrays = [np.stack([row.arrays[name] for row in padded]) for name in names]
        keys = np.array([[self.seed, row.index] for row in padded], np.uint32)
        made = np.asarray(functions[self.requires()[0]](*arrays, keys))
        expected = (self.batch_size, *self.frame.size, 3)
        if made.shape != expected:
            raise ValueError(
                f"{self.name}: expected pictures of shape {list(expected)} from "
                f"{self.requires()[0]!r}, found {list(made.shape)}; the frame has to have the "
                "sizes that the system was made for"
            )
        return to_bytes(made)[: len(chunk)]

    def _write(self, record: TryOnRecord, picture: np.ndarray) -> None:
        name = Path(str(record.extra.get("file", record.id))).with_suffix(
            ".jpg" if self.encoding == "jpeg" else ".png"
        )
        folder = Path(self.save).expanduser() / self.name / str(record.extra.get("folder", ""))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name.name).write_bytes(encoded(picture, self.encoding))


@dataclasses.dataclass(frozen=True)
class _Row:
    """A record with the arrays that the model takes, and its truth where there is one."""

    index: int
    record: TryOnRecord
    arrays: dict[str, np.ndarray]
    truth: np.ndarray | None


class _Garments:
    """How often the right garment is worn, where records know it (the try-on world)."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, int, int]] = []

    def add(self, record: TryOnRecord, picture: np.ndarray) -> None:
        """Classify a picture, and the truth beside it."""
        if "label" not in record.extra or "region" not in record.extra:
            return
        region = np.asarray(record.extra["region"])
        if region.shape != picture.shape[:2]:
            size = (picture.shape[1], picture.shape[0])
            region = np.asarray(Image.fromarray(region).resize(size, Image.Resampling.NEAREST))
        made = garment_classifier.classify(picture, region)
        own = np.asarray(record.extra["region"])
        truth = garment_classifier.classify(np.asarray(record.extra["truth"]), own)
        self._rows.append((record.extra["label"], made, truth))

    def metrics(self) -> dict[str, Metric]:
        """Accuracy of class, colour and pattern with chance, and of the classifier on the truth."""
        if not self._rows:
            return {}
        label, made, truth = np.array(self._rows).T
        count = len(PATTERNS)
        known = made != garment_classifier.NOTHING
        return {
            "garment_accuracy": Metric(float((made == label).mean()), garment_classifier.chance()),
            "colour_accuracy": Metric(
                float((known & (made // count == label // count)).mean()), 1 / len(FABRICS)
            ),
            "pattern_accuracy": Metric(
                float((known & (made % count == label % count)).mean()), 1 / count
            ),
            "classifier_on_truth": Metric(
                float((truth == label).mean()), garment_classifier.chance()
            ),
        }


def _panel(kept: Sequence[tuple[_Row, np.ndarray]]) -> Panel:
    rows = []
    for row, picture in kept:
        arrays = row.arrays
        truth = row.record.extra.get("truth", arrays.get("target") if row.record.paired else None)
        rows.append(
            {
                "given": arrays["subject"],
                "garment": arrays["garment"],
                "reference": arrays.get("reference"),
                "generated": picture,
                "truth": None if truth is None else np.asarray(truth),
            }
        )
    return Panel(
        "People in their new clothes",
        f"{len(rows)} records at even distances through the set, not picked: what the model is "
        "given, what it makes, and the truth where it is known.",
        try_on_sheet(rows),
    )
