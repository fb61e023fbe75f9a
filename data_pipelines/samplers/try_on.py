"""Dressing people: own pictures, or records of a try-on set (functions of
`data_pipelines.tryon.pipeline`, "Sampling")."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import numpy as np

from data_pipelines.protocols.picture_scores import to_bytes
from data_pipelines.protocols.try_on import Subject
from data_pipelines.records import BadRecordError, ImageLike, TryOnRecord
from data_pipelines.samplers.base import Call, Input, Made, Request, Sampler
from data_pipelines.tryon.pipeline import check_sizes
from data_pipelines.tryon.source import TryOnSource
from data_pipelines.tryon.transforms import Frame, pictures

PERSON, GARMENT, REFERENCE = "person", "garment", "reference"


@dataclasses.dataclass(frozen=True)
class TryOnSampler(Sampler):
    """See the module's description.

    Attributes:
      source: records that are dressed when no pictures are given; None for none.
      frame: sizes of the pictures, as in training.
      subject: of records, the model is given the person photo (mask-free) or the agnostic one.
      reference: of records, it is given somebody else in the garment as well. Of own pictures it is
        given what there is.
      multiple: sides have to be multiples of it, see `TryOnPipeline`.
    """

    source: TryOnSource | None = None
    frame: Frame = Frame()  # noqa: RUF009 - frozen, so one instance serves all
    subject: Subject = "person"
    reference: bool = False
    multiple: int = 16

    def inputs(self) -> tuple[Input, ...]:
        return (
            Input(
                PERSON, "picture", "the person's photo, or that with the garment's region masked"
            ),
            Input(GARMENT, "picture", "the garment, laid flat"),
            Input(REFERENCE, "picture", "somebody else in the garment", required=False),
        )

    def requires(self) -> tuple[str, ...]:
        return ("sample", "sample_reference")

    def check(self) -> None:
        """Raises ValueError for sizes that cannot be."""
        check_sizes(self.frame, self.multiple, "sampler.frame")

    def count(self) -> int:
        return 0 if self.source is None else len(self.source)

    def example(self, index: int, seed: int) -> Request:
        assert self.source is not None  # `count` is 0 without
        record = self.source[index]
        subject = record.person
        if self.subject == "agnostic":
            subject = record.agnostic[0] if record.agnostic else None
        reference = record.references[0] if self.reference and record.references else None
        for part, image in ((self.subject, subject), ("reference", reference)):
            if image is None and (part != "reference" or self.reference):
                raise BadRecordError(f"missing_{part}", f"{record.id} has no {part} photo")
        images = {PERSON: subject, GARMENT: record.garment, REFERENCE: reference}
        given = {name: (image,) for name, image in images.items() if image is not None}
        return Request(record.id, index, seed, given, record)

    def call(self, request: Request) -> Call:
        person, garment, reference = (
            cast(ImageLike | None, request.one(name)) for name in (PERSON, GARMENT, REFERENCE)
        )
        assert person is not None  # it and the garment are required
        assert garment is not None
        frame = self.frame
        shown = {
            PERSON: frame.full(frame.decode(person)),
            GARMENT: frame.full(frame.decode(garment)),
        }
        if reference is not None:
            shown[REFERENCE] = frame.reference(frame.decode(reference))
        function = "sample" if reference is None else "sample_reference"
        return Call(function, (*shown.values(), request.key), shown)

    def finish(self, request: Request, call: Call, output: Any) -> Made:
        picture = to_bytes(np.asarray(output)[None])[0]
        record, truth = request.record, None
        if isinstance(record, TryOnRecord) and record.paired:
            truth = pictures(record, self.frame, ("target",)).get("target")
        shown = {name: call.kept.get(name) for name in (PERSON, GARMENT, REFERENCE)}
        facts = {"reference": REFERENCE in call.kept}
        return Made(facts, picture, {**shown, "result": picture, "truth": truth})
