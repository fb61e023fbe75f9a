"""Batches for virtual try-on (RefTON): arrays, conditions that are drawn, and what sampling takes.

Everything that a system and its evaluation rely on stands here.

Legend: B records, H, W picture size, h, w = int(H // cond_scale), int(W // cond_scale).

Training batch (`TryOnPipeline.batches`; pixels are 0..255, `x / 127.5 - 1` gives the official
[-1, 1], rows top to bottom, RGB):

  target         uint8 [B, H, W, 3]  the person wearing the garment: what is to be generated
  subject        uint8 [B, H, W, 3]  label 1: the person in other clothes, or the agnostic photo
                                     (garment region masked); which of them is drawn
  garment        uint8 [B, H, W, 3]  label 2: the flat garment
  mask           uint8 [B, h, w, 3]  label 3, with use_mask: the masked region (white), as RGB
  use_mask       bool  [B]
  dense          uint8 [B, h, w, 3]  label 4, with use_dense: DensePose picture
  use_dense      bool  [B]
  reference      uint8 [B, h, w, 3]  label 5, with use_reference: somebody else in the garment
  use_reference  bool  [B]

`mask`, `dense`, `reference` and their flags are in the batch exactly when the pipeline's
probability for them (`mask_prob`, `dense_prob`, `reference_prob`) is above 0, so shapes are static;
where a flag is False the picture is zeros and its tokens have to take no part. With
`draws="step"` (default) a flag is the same for the whole global batch, except that it is False for
a record that has no such picture. Position labels and index scales (`labels 3..5: cond_scale`,
others 1) are the system's. Texts are not in the batch: the official code encodes one constant
prompt (empty) and uses it for every record.

Draws (spec section 3; official `process_latent_cond`): u0 < person_prob takes the person, else the
agnostic photo; then three numbers, mask, dense and reference are *included* where the number is
below the probability. The official flag `--dropout_reference` is such an inclusion probability, for
all three at once. There it is drawn per process and micro-batch, here per global step, from a
stream of (seed, step), so every host draws the same. Which agnostic variant and which of several
references is drawn per record. No flips, no crops, no colour jitter: the official transforms only
resize to the size asked for (bilinear, antialiased, aspect ratio not kept).

Sampling (`data_pipelines.protocols.try_on.TryOn`) calls one of these functions of the system:

  sample(params, subject, garment, key)                        -> picture
  sample_reference(params, subject, garment, reference, key)   -> picture

  subject, garment  uint8 [n, H, W, 3];  reference uint8 [n, h, w, 3]
  key               uint32 [n, 2], one raw threefry key per row (`jax.random.wrap_key_data(key[i])`
                    or `jax.random.normal(key[i], ...)` under vmap): the noise of a row depends on
                    its own key only
  picture           float32 [n, H, W, 3] in 0..1 (clamped by the system), or uint8

Steps, guidance and the prompt are settings of the system.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from data_pipelines.batch import DataError
from data_pipelines.encoded import Encoded, EncodedRecord
from data_pipelines.encoding import Encodable, Piece, Pieces, source_folder
from data_pipelines.images import ImageLimits
from data_pipelines.records import BadRecordError, ImageLike, TryOnRecord
from data_pipelines.sampling import Made, Recipe, RecordPipeline
from data_pipelines.sources.base import (
    Mixture,
    Source,
    describe_sources,
    digest,
    settings_of,
    sources_of,
    weights_of,
)
from data_pipelines.tryon.draws import Conditions, Probabilities, draw_conditions, pick
from data_pipelines.tryon.latents import check_encoded, list_forms, pieces_of, row_of, sizes_of
from data_pipelines.tryon.source import Part, TryOnSource
from data_pipelines.tryon.transforms import Frame
from data_pipelines.tryon.validation import TryOnLimits, check_alignment, check_mask, check_shares

# Optional conditions in the order of their position labels (3, 4, 5).
OPTIONAL: tuple[Literal["mask", "dense", "reference"], ...] = ("mask", "dense", "reference")

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class TryOnPipeline(Encodable, RecordPipeline):
    """Training data for virtual try-on; the module's description says what a batch is.

    Attributes:
      source: one source of `TryOnRecord`s, or several with weights.
      height, width, cond_scale, resize, alpha: see `transforms.Frame`.
      person_prob: the subject is the person photo, else the agnostic one.
      mask_prob, dense_prob, reference_prob: these are *included* with that probability. The
        published command has 0.5 for all three; the released data holds references only.
      draws: conditions are drawn once per global step, or for each record.
      person_from_target: take the target where a record has no person photo. The official loaders
        do so without a word where there is no `person/` folder; the model then sees the answer, so
        here it has to be asked for.
      multiple: H, W, h and w have to be multiples of it: autoencoder factor (8) times patch (2).
      encoded: folder of `jaxmods encode`: batches are its latents (bfloat16, see
        `data_pipelines.tryon.latents`), for a system with `inputs="latents"`, and the sources are
        not opened. "" reads pictures.
      encoded_digest: of the encoder that must have made them (`encoder_digest`); "" for any.
      checks: what a usable record is. image_limits: what a usable picture is.
      tolerance, reading: see `RecordPipeline`.
    """

    source: TryOnSource | Mixture
    height: int = 512
    width: int = 384
    cond_scale: float = 1.0
    resize: Literal["stretch", "pad"] = "stretch"
    alpha: Literal["drop", "white"] = "drop"
    person_prob: float = 0.5
    mask_prob: float = 0.0
    dense_prob: float = 0.0
    reference_prob: float = 0.5
    draws: Literal["step", "record"] = "step"
    person_from_target: bool = False
    multiple: int = 16
    encoded: str = ""
    encoded_digest: str = ""
    checks: TryOnLimits = dataclasses.field(default_factory=TryOnLimits)
    image_limits: ImageLimits = dataclasses.field(default_factory=ImageLimits)

    def __post_init__(self) -> None:
        if len(self.sources) != len(sources_of(self.source)):
            raise ValueError("data.source: expected sources of try-on records (TryOnSource)")
        _ = self.probabilities
        check_sizes(self.frame, self.multiple, "data")

    @functools.cached_property
    def frame(self) -> Frame:
        """Sizes of the pictures."""
        return Frame(
            self.height, self.width, self.cond_scale, self.resize, self.alpha, self.image_limits
        )

    @functools.cached_property
    def probabilities(self) -> Probabilities:
        """Of the conditions."""
        return Probabilities(self.person_prob, self.mask_prob, self.dense_prob, self.reference_prob)

    @property
    def sources(self) -> tuple[TryOnSource, ...]:
        """The sources, one or several."""
        return tuple(s for s in sources_of(self.source) if isinstance(s, TryOnSource))

    @functools.cached_property
    def encoded_sources(self) -> tuple[Encoded, ...]:
        """What `encoded` holds, a source for each of `sources`."""
        folders = (source_folder(self.encoded, n) for n in range(len(self.sources)))
        return tuple(Encoded(str(folder)) for folder in folders)

    @property
    def included(self) -> tuple[Literal["mask", "dense", "reference"], ...]:
        """Optional conditions that batches have arrays for, in the order of their labels."""
        return tuple(n for n in OPTIONAL if getattr(self.probabilities, n) > 0)

    def recipe(self) -> Recipe[Any]:
        """See `RecordPipeline.recipe` and the module's description.

        Raises:
          DataError: also when a source has none of the pictures that a probability asks for.
        """
        self.check_sources()
        sources = self.encoded_sources if self.encoded else self.sources
        make = self.make_encoded if self.encoded else self.make
        return Recipe(sources, weights_of(self.source), make, self.collate, step_stream=True)

    def check_sources(self) -> None:
        """Raise DataError when a source lacks what training needs, naming where it was looked for
        and the setting to change; of encoded examples, when they are not those of this recipe."""
        for encoded in self.encoded_sources if self.encoded else ():
            check_encoded(encoded, self.frame, self.encoded_digest)
        offers = self._offers()

        def refuse(source: TryOnSource, part: Part, setting: str, advice: str) -> None:
            raise DataError(
                f"{source.name}: {setting} needs pictures of kind {part!r}, found none; looked "
                f"for in {source.looked_for(part)}. {advice}"
            )

        for source, parts in zip(self.sources, offers, strict=True):
            if "target" not in parts:
                refuse(source, "target", "training", "Without them there is nothing to learn")
            if self.person_prob > 0 and "person" not in parts and not self.person_from_target:
                refuse(
                    source,
                    "person",
                    f"data.person_prob={self.person_prob:g}",
                    "Add them, set data.person_prob=0, or set data.person_from_target=True to "
                    "show the model the target itself",
                )
            if self.person_prob < 1 and "agnostic" not in parts:
                refuse(
                    source,
                    "agnostic",
                    f"data.person_prob={self.person_prob:g}",
                    "Add them, or set data.person_prob=1",
                )
        for name in self.included:
            if not any(name in parts for parts in offers):
                setting = f"data.{name}_prob={getattr(self, f'{name}_prob'):g}"
                refuse(self.sources[0], name, setting, f"Add them, or set data.{name}_prob=0")

    def _offers(self) -> list[frozenset[Part]]:
        if self.encoded:
            return [frozenset(s.about.get("offers", ())) for s in self.encoded_sources]
        return [s.offers() for s in self.sources]

    def make(
        self, record: TryOnRecord, rng: np.random.Generator, step_rng: np.random.Generator
    ) -> Made[Arrays]:
        """One record to one row of the batch. Raises BadRecordError."""
        return self.example(record, self._draw(rng, step_rng), rng)

    def make_encoded(
        self, record: EncodedRecord, rng: np.random.Generator, step_rng: np.random.Generator
    ) -> Made[Arrays]:
        """The same of an encoded record."""
        drawn = self._draw(rng, step_rng)
        return row_of(record, drawn, rng, self.included, person_from_target=self.person_from_target)

    def _draw(self, rng: np.random.Generator, step_rng: np.random.Generator) -> Conditions:
        uniform = (step_rng if self.draws == "step" else rng).random(4).tolist()
        return draw_conditions(uniform, self.probabilities)

    def example(
        self, record: TryOnRecord, drawn: Conditions, rng: np.random.Generator
    ) -> Made[Arrays]:
        """The arrays of one record, without the batch dimension, for given conditions.

        `rng` draws which variant of the agnostic photo and which reference is taken. `repaired`
        counts optional pictures that were drawn and that the record lacks ("no_reference", ...).

        Raises:
          BadRecordError: also missing_target, missing_person, missing_agnostic.
        """
        check_shares(record)
        if record.target is None:
            raise BadRecordError("missing_target", "the record has no picture to learn from")
        target = self.frame.decode(record.target)
        row = {
            "target": self.frame.full(target),
            "garment": self.frame.full(self.frame.decode(record.garment)),
        }
        variant = pick(len(record.agnostic), record.agnostic_shares, rng)
        view = pick(len(record.references), (), rng)
        if drawn.person and record.person is None and self.person_from_target:
            row["subject"] = row["target"]
        else:
            kind = "person" if drawn.person else "agnostic"
            image = record.person if drawn.person else _at(record.agnostic, variant)
            if image is None:
                raise BadRecordError(f"missing_{kind}", f"the record has no {kind} photo")
            subject = self.frame.decode(image)
            if not drawn.person:
                check_alignment(kind, subject, target, self.checks)
            row["subject"] = self.frame.full(subject)
        repaired: dict[str, int] = {}
        h, w = self.frame.cond_size
        options: dict[str, ImageLike | None] = {
            "mask": record.mask,
            "dense": record.dense,
            "reference": _at(record.references, view),
        }
        for name in self.included:
            image, wanted = options[name], bool(getattr(drawn, name))
            if wanted and image is None:
                repaired[f"no_{name}"] = 1
            use = wanted and image is not None
            row[f"use_{name}"] = np.array(use)
            row[name] = np.zeros((h, w, 3), np.uint8)
            if image is None or not wanted:
                continue
            picture = self.frame.decode(image)
            if name == "reference":
                row[name] = self.frame.reference(picture)
                continue
            check_alignment(name, picture, target, self.checks)
            row[name] = self.frame.map(picture)
            if name == "mask":
                check_mask(row[name], self.checks)
        return Made(row, repaired)

    def collate(self, rows: Sequence[Arrays]) -> tuple[Arrays, dict[str, int]]:
        """Rows to the arrays of a batch; nothing is cut."""
        names = ("target", "subject", "garment", *(
            n for name in self.included for n in (name, f"use_{name}")
        ))  # fmt: skip
        return {name: np.stack([row[name] for row in rows]) for name in names}, {}

    def to_encode(self) -> tuple[TryOnSource, ...]:
        return self.sources

    def pieces(self, record: TryOnRecord) -> Pieces:
        return pieces_of(record, self.frame, self.checks)

    def lists(self) -> dict[str, Piece]:
        return list_forms(self.frame)

    def encoding_facts(self, source: Source[Any]) -> dict[str, Any]:
        offers = sorted(source.offers()) if isinstance(source, TryOnSource) else []
        return {"sizes": sizes_of(self.frame), "offers": offers}

    def fingerprint(self) -> str:
        left_out = ("source", "tolerance", "reading", "encoded", "encoded_digest")
        settings, weights = settings_of(self, *left_out), weights_of(self.source)
        sources: tuple[Source[Any], ...] = self.encoded_sources if self.encoded else self.sources
        return digest([s.fingerprint() for s in sources], weights, repr(settings))

    def describe(self) -> dict[str, Any]:
        """Facts; a source that cannot be opened is described by its problem."""
        facts: dict[str, Any] = {
            "pictures": list(self.frame.size),
            "conditions": list(self.frame.cond_size),
            "probabilities": dataclasses.asdict(self.probabilities),
        }
        return facts | describe_sources(self.encoded_sources if self.encoded else self.sources)


def check_sizes(frame: Frame, multiple: int, where: str) -> None:
    """Raise ValueError, with the next sizes that fit, unless all sides are multiples."""
    for what, sides in (("picture", frame.size), ("condition", frame.cond_size)):
        if any(side % multiple for side in sides):
            good = [round(side / multiple) * multiple or multiple for side in sides]
            h, w = good if what == "picture" else [round(side * frame.cond_scale) for side in good]
            raise ValueError(
                f"{where}: {what} size {sides[0]}x{sides[1]} (height {frame.height}, width "
                f"{frame.width}, cond_scale {frame.cond_scale:g}): expected multiples of "
                f"{multiple}; for example {where}.height={h} {where}.width={w}"
            )


def _at(images: Sequence[ImageLike], index: int) -> ImageLike | None:
    return images[index] if images else None
