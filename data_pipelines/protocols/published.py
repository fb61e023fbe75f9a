"""The published protocols, by name: what each number depends on, and the paper's beside ours.

`PROTOCOLS["dci"](root=..., images=..., tokenizer=..., model="fgclip/large")` is complete: picture
size and text length follow from the model and the protocol. Setting either to something else, a
part of the set, or other prompts makes the number incomparable, and `check()` refuses it unless
`allow_incomparable=True`, which marks the result instead.

Published figures: arXiv 2510.10921 (tables 1, 2, 4), which re-lists FG-CLIP of arXiv 2505.05071.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from data_pipelines.protocols.base import (
    EvalResult,
    Functions,
    IncomparableError,
    Metric,
    Protocol,
)
from data_pipelines.protocols.box_layouts import (
    CocoInstances,
    FgOvd,
    FgOvdSubset,
    LvisInstances,
)
from data_pipelines.protocols.captions import SourceRetrieval
from data_pipelines.protocols.classes import SourceBoxClassification, SourceClassification
from data_pipelines.protocols.layouts import (
    CocoCaptions,
    Dci,
    Flickr30k,
    ImageNet,
    Listed,
    ShareGpt4v,
    Urban1k,
)
from data_pipelines.protocols.negatives import SourceHardNegatives
from data_pipelines.protocols.prompts import (
    OPENAI_TEMPLATES,
    are_published_names,
    imagenet_classes,
)
from data_pipelines.tokenizers import Tokenizer

Model = Literal["", "fgclip/base", "fgclip/large"]

NOT_COMPARABLE = "not comparable with the published number"


@dataclasses.dataclass(frozen=True)
class ModelRules:
    """What a published model was evaluated at: side of the square picture, text lengths."""

    image_size: int
    context_short: int = 77
    context_long: int = 248


MODELS: dict[str, ModelRules] = {
    "fgclip/base": ModelRules(224),
    "fgclip/large": ModelRules(336),
}

# protocol -> model -> metric -> published value (fraction)
PUBLISHED: dict[str, dict[str, dict[str, float]]] = {
    "coco": {
        "fgclip/base": {"i2t_r1": 0.641, "t2i_r1": 0.454},
        "fgclip/large": {"i2t_r1": 0.689, "t2i_r1": 0.509},
    },
    "flickr30k": {
        "fgclip/base": {"i2t_r1": 0.907, "t2i_r1": 0.764},
        "fgclip/large": {"i2t_r1": 0.937, "t2i_r1": 0.815},
    },
    "sharegpt4v_1k": {
        "fgclip/base": {"i2t_r1": 0.967, "t2i_r1": 0.949},
        "fgclip/large": {"i2t_r1": 0.974, "t2i_r1": 0.968},
    },
    "dci": {
        "fgclip/base": {"i2t_r1": 0.618, "t2i_r1": 0.606},
        "fgclip/large": {"i2t_r1": 0.667, "t2i_r1": 0.661},
    },
    "imagenet": {"fgclip/base": {"top1": 0.690}, "fgclip/large": {"top1": 0.761}},
    "imagenet_v2": {"fgclip/base": {"top1": 0.618}, "fgclip/large": {"top1": 0.690}},
    "coco_boxes": {"fgclip/base": {"top1": 0.523}, "fgclip/large": {"top1": 0.632}},
    "lvis_boxes": {"fgclip/base": {"top1": 0.286}, "fgclip/large": {"top1": 0.383}},
    "fgovd_hard": {"fgclip/base": {"accuracy": 0.461}, "fgclip/large": {"accuracy": 0.484}},
    "fgovd_medium": {"fgclip/base": {"accuracy": 0.666}, "fgclip/large": {"accuracy": 0.695}},
    "fgovd_easy": {"fgclip/base": {"accuracy": 0.687}, "fgclip/large": {"accuracy": 0.712}},
    "fgovd_trivial": {"fgclip/base": {"accuracy": 0.834}, "fgclip/large": {"accuracy": 0.897}},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedProtocol(Protocol):
    """A published evaluation: reader, text length, picture size, prompts and counting fixed.

    Attributes:
      root: folder of the set in its published layout (docs/evaluation.md).
      images: folder of its pictures, where they lie elsewhere.
      tokenizer: the model's, as a folder or a tokenizer.
      model: which published model's numbers and sizes apply; "" for a model without any.
      image_size: None takes the model's; required when `model` is "".
      context: None takes the protocol's.
      batch_size, text_batch_size, box_slots, workers: speed only, see `Reading`.
      limit: evaluate the first records only.
      allow_incomparable: run in spite of settings that break the protocol, and mark the result.
    """

    root: str
    tokenizer: str | Tokenizer
    images: str | None = None
    model: Model = ""
    image_size: int | None = None
    context: int | None = None
    batch_size: int = 64
    text_batch_size: int = 256
    box_slots: int = 32
    workers: int = 4
    limit: int | None = None
    allow_incomparable: bool = False

    TEXT: ClassVar[Literal["short", "long"]] = "short"
    REQUIRES: ClassVar[tuple[str, ...]] = ("box_features", "text_features_short")
    # What the published number is over: a name among the result's counts (or "records") and how
    # many; None where that is not known.
    EXPECTED: ClassVar[tuple[str, int] | None] = None

    @abc.abstractmethod
    def source(self) -> Listed:
        """A reader of the set."""

    @abc.abstractmethod
    def counted_by(self) -> Protocol:
        """The protocol over `reader` that does the work."""

    @functools.cached_property
    def reader(self) -> Any:
        """`source()`, opened once."""
        return self.source()

    def rules(self) -> ModelRules:
        """Sizes of the model, or the general text lengths with the given picture size."""
        if self.model in MODELS:
            return MODELS[self.model]
        if self.model:
            raise ValueError(f"{self.name}: expected model in {list(MODELS)}, found {self.model!r}")
        if self.image_size is None:
            raise ValueError(
                f"{self.name}: expected image_size, or a published model that it follows from "
                f"({', '.join(MODELS)}); found neither"
            )
        return ModelRules(self.image_size)

    def text_length(self) -> int:
        """Tokens per text: `context`, or the protocol's."""
        rules = self.rules()
        own = rules.context_long if self.TEXT == "long" else rules.context_short
        return own if self.context is None else self.context

    def picture_size(self) -> int:
        """Side of the square picture: `image_size`, or the model's."""
        return self.rules().image_size if self.image_size is None else self.image_size

    def options(self) -> dict[str, Any]:
        """Arguments of `counted_by()`'s protocol: the reader and everything that is fixed."""
        return {
            "source": self.reader,
            "tokenizer": self.tokenizer,
            "image_size": self.picture_size(),
            "context": self.text_length(),
            "limit": self.limit,
            "batch_size": self.batch_size,
            "text_batch_size": self.text_batch_size,
            "box_slots": self.box_slots,
            "workers": self.workers,
            "limits": None,
        }

    def deviations(self) -> tuple[str, ...]:
        """Settings that make the number incomparable, each with what to do."""
        rules, found = self.rules(), []
        own = rules.context_long if self.TEXT == "long" else rules.context_short
        if self.text_length() != own:
            why = (
                "the captions run to hundreds of tokens, so most of each would be cut, and texts "
                "of up to 100 tokens use the short position table"
                if self.TEXT == "long"
                else "longer texts use other position and projection tables"
            )
            found.append(
                f"context={self.text_length()}: {self.name} is defined at {own} tokens; {why}. "
                f"Set context={own}"
            )
        size = self.picture_size()
        if size != rules.image_size:
            found.append(
                f"image_size={size}: {self.model} was trained and published at "
                f"{rules.image_size} px; at another size it sees another number of patches and "
                f"scores far lower or fails. Set image_size={rules.image_size}"
            )
        if self.limit is not None:
            found.append(
                f"limit={self.limit}: with fewer candidates retrieval is easier, and part of the "
                "set is another set. Set limit=None"
            )
        return tuple(found)

    def check(self) -> None:
        deviations = self.deviations()
        if deviations and not self.allow_incomparable:
            raise IncomparableError(
                f"{self.name}: {'; '.join(deviations)}; or set allow_incomparable=True to run it "
                f"all the same, marked '{NOT_COMPARABLE}'"
            )

    def requires(self) -> tuple[str, ...]:
        return self.REQUIRES

    def run(self, functions: Functions, *, panels: bool = False) -> EvalResult:
        self.check()
        result = self.counted_by().run(functions, panels=panels)
        reasons = list(self.deviations())
        expected = self.expected()
        if expected is not None and self.limit is None:
            what, number = expected
            evaluated = {**result.counts, "records": result.records}[what]
            if evaluated != number:
                reasons.append(
                    f"{evaluated:,} {what} were evaluated, the published set has {number:,}"
                )
        published = PUBLISHED.get(self.name, {}).get(self.model, {})
        notes = tuple(f"{NOT_COMPARABLE}: {r}" for r in reasons)
        return dataclasses.replace(
            result,
            protocol=self.name,
            metrics={
                k: Metric(m.value, m.chance, published.get(k)) for k, m in result.metrics.items()
            },
            settings={
                **result.settings,
                "model": self.model or "unpublished",
                "root": self.root,
                "images": self.images,
                "comparable": not reasons,
            },
            counts={**result.counts, **{f"source_{k}": v for k, v in self.reader.report().items()}},
            notes=notes + result.notes,
        )

    def expected(self) -> tuple[str, int] | None:
        """See `EXPECTED`."""
        return self.EXPECTED


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Retrieval(PublishedProtocol):
    REQUIRES: ClassVar[tuple[str, ...]] = ("image_features", "text_features_short")

    def counted_by(self) -> Protocol:
        return SourceRetrieval(
            **self.options(),
            text=self.TEXT,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CocoRetrieval(_Retrieval):
    """COCO val2017, five captions a picture, 77 tokens, no prompt."""

    EXPECTED: ClassVar[tuple[str, int] | None] = ("records", 5000)

    @property
    def name(self) -> str:
        return "coco"

    def source(self) -> Listed:
        return CocoCaptions(self.root, self.images)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flickr30kRetrieval(_Retrieval):
    """Flickr30k test, five captions a picture, 77 tokens, no prompt."""

    EXPECTED: ClassVar[tuple[str, int] | None] = ("records", 1000)

    @property
    def name(self) -> str:
        return "flickr30k"

    def source(self) -> Listed:
        return Flickr30k(self.root, self.images)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShareGpt4vRetrieval(_Retrieval):
    """ShareGPT4V-1k, one long caption a picture, 248 tokens."""

    TEXT: ClassVar[Literal["short", "long"]] = "long"
    REQUIRES: ClassVar[tuple[str, ...]] = ("image_features", "text_features_long")
    EXPECTED: ClassVar[tuple[str, int] | None] = ("records", 1000)

    @property
    def name(self) -> str:
        return "sharegpt4v_1k"

    def source(self) -> Listed:
        return ShareGpt4v(self.root, self.images)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DciRetrieval(_Retrieval):
    """DCI, one long caption (`extra_caption`) a picture, 248 tokens."""

    TEXT: ClassVar[Literal["short", "long"]] = "long"
    REQUIRES: ClassVar[tuple[str, ...]] = ("image_features", "text_features_long")
    EXPECTED: ClassVar[tuple[str, int] | None] = ("records", 7805)

    @property
    def name(self) -> str:
        return "dci"

    def source(self) -> Listed:
        return Dci(self.root, self.images)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Urban1kRetrieval(_Retrieval):
    """Urban1k, one long caption a picture, 248 tokens."""

    TEXT: ClassVar[Literal["short", "long"]] = "long"
    REQUIRES: ClassVar[tuple[str, ...]] = ("image_features", "text_features_long")
    EXPECTED: ClassVar[tuple[str, int] | None] = ("records", 1000)

    @property
    def name(self) -> str:
        return "urban1k"

    def source(self) -> Listed:
        return Urban1k(self.root, self.images)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Prompted(PublishedProtocol):
    """Protocols with class prompts. `templates`: the 80 published ones unless marked."""

    templates: tuple[str, ...] = OPENAI_TEMPLATES

    def deviations(self) -> tuple[str, ...]:
        found = super().deviations()
        if self.templates == OPENAI_TEMPLATES:
            return found
        return (
            *found,
            f"templates: {len(self.templates)} of your own, the published numbers average "
            f"{len(OPENAI_TEMPLATES)} prompt templates. Leave templates as it is",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageNetZeroShot(_Prompted):
    """ImageNet-1K validation, 80 templates, 1,000 published class names.

    The official script drops its last incomplete batch; here every picture counts once.

    Attributes:
      classes: file of the class names, `<wnid> <name>` a line; "" is `classes.txt` under `root`.
    """

    REQUIRES: ClassVar[tuple[str, ...]] = ("image_features", "text_features_short")
    classes: str = ""
    EXPECTED: ClassVar[tuple[str, int] | None] = ("records", 50_000)

    @property
    def name(self) -> str:
        return "imagenet"

    @property
    def classes_file(self) -> str:
        return self.classes or str(Path(self.root) / "classes.txt")

    def deviations(self) -> tuple[str, ...]:
        found = super().deviations()
        if are_published_names(imagenet_classes(self.classes_file)):
            return found
        return (
            *found,
            f"classes: the names in {self.classes_file} are not those that the published numbers "
            "were made with",
        )

    def source(self) -> Listed:
        return ImageNet(self.root, self.images, self.classes_file)

    def counted_by(self) -> Protocol:
        return SourceClassification(
            **self.options(),
            classes=tuple(name for _, name in imagenet_classes(self.classes_file)),
            templates=self.templates,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageNetV2ZeroShot(ImageNetZeroShot):
    """ImageNet-V2 matched frequency, 80 templates, 1,000 published class names."""

    EXPECTED: ClassVar[tuple[str, int] | None] = ("records", 10_000)

    @property
    def name(self) -> str:
        return "imagenet_v2"

    def source(self) -> Listed:
        return ImageNet(self.root, self.images, self.classes_file, label="imagenet/v2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CocoBoxClassification(_Prompted):
    """COCO val2017, 36,781 boxes, 80 classes, 80 templates; crowds included."""

    EXPECTED: ClassVar[tuple[str, int] | None] = ("regions", 36_781)

    @property
    def name(self) -> str:
        return "coco_boxes"

    def source(self) -> CocoInstances:
        return CocoInstances(self.root, self.images)

    def counted_by(self) -> Protocol:
        return SourceBoxClassification(
            **self.options(),
            classes=tuple(self.reader.names.values()),
            templates=self.templates,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LvisBoxClassification(_Prompted):
    """LVIS v1 val boxes, 1,203 classes, 80 templates.

    `folders`: see `LvisInstances`; which pictures the published number is over is an assumption, so
    the counts say what was found.
    """

    folders: Literal["val2017", "all"] = "val2017"

    @property
    def name(self) -> str:
        return "lvis_boxes"

    def source(self) -> LvisInstances:
        return LvisInstances(self.root, self.images, folders=self.folders)

    def counted_by(self) -> Protocol:
        return SourceBoxClassification(
            **self.options(),
            classes=tuple(self.reader.names.values()),
            templates=self.templates,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FgOvdHardNegatives(PublishedProtocol):
    """FG-OVD, one subset: 77 tokens, no prompt, case kept; 2 to 10 negatives a box."""

    subset: FgOvdSubset = "hard"

    @property
    def name(self) -> str:
        return f"fgovd_{self.subset}"

    def expected(self) -> tuple[str, int] | None:
        rows = {"hard": 3545, "medium": 2968, "easy": 1299, "trivial": 3545}
        return "regions", rows[self.subset]

    def source(self) -> Listed:
        return FgOvd(self.root, self.images, self.subset)

    def counted_by(self) -> Protocol:
        return SourceHardNegatives(
            **self.options(),
        )


SUBSETS: tuple[FgOvdSubset, ...] = get_args(FgOvdSubset)

# Name -> constructor, as `PROTOCOLS["dci"](root=..., tokenizer=..., model="fgclip/base")`.
PROTOCOLS: dict[str, Callable[..., PublishedProtocol]] = {
    "coco": CocoRetrieval,
    "flickr30k": Flickr30kRetrieval,
    "sharegpt4v_1k": ShareGpt4vRetrieval,
    "dci": DciRetrieval,
    "urban1k": Urban1kRetrieval,
    "imagenet": ImageNetZeroShot,
    "imagenet_v2": ImageNetV2ZeroShot,
    "coco_boxes": CocoBoxClassification,
    "lvis_boxes": LvisBoxClassification,
    **{f"fgovd_{s}": functools.partial(FgOvdHardNegatives, subset=s) for s in SUBSETS},
}


def table() -> str:
    """The published protocols with the published values, as a Markdown table."""
    head = ["name", "what", "metric", *MODELS]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for name, make in PROTOCOLS.items():
        kind = make.func if isinstance(make, functools.partial) else make
        what = " ".join((inspect.getdoc(kind) or "").partition("\n\n")[0].split())
        by_model = PUBLISHED.get(name, {})
        metrics = next(iter(by_model.values()), {})
        values = [
            " / ".join(f"{100 * v:.1f}" for v in by_model.get(model, {}).values()) or "–"
            for model in MODELS
        ]
        lines.append(" | ".join((f"`{name}`", what, " / ".join(metrics) or "–", *values)))
    return "\n".join(f"| {line} |" for line in lines)
