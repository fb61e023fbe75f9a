"""Class prompts of the zero-shot protocols, and the list of ImageNet's class names.

The 80 templates are those of CLIP's ImageNet evaluation (Radford et al. 2021, section 3.1.4), which
FG-CLIP's evaluation uses unchanged. They are written here by kind of variation; a class vector is
the mean over all of them, so their order carries no meaning.

The 1,000 class names that CLIP's authors chose for ImageNet are not part of this project: a
protocol reads them from a file, one class per line as `<wnid> <name>`, and knows the published list
by its digest.
"""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path

from data_pipelines.batch import DataError

_SAID_OF_BOTH = (  # of "a {}" and of "the {}"
    *(
        f"a {quality}photo of"
        for quality in (
            "", "bad ", "good ", "low resolution ", "cropped ", "bright ", "dark ", "blurry ",
            "black and white ", "pixelated ", "jpeg corrupted ", "close-up ",
        )
    ),
    *(
        f"a {made} of"
        for made in (
            "rendering", "sculpture", "painting", "drawing", "sketch", "rendition", "tattoo",
            "doodle",
        )
    ),
    *("itap of", "art of", "graffiti of"),
)  # fmt: skip
_STATES = ("clean", "dirty", "cool", "nice", "weird", "large", "small", "hard to see")
_KINDS = ("cartoon", "origami", "embroidered", "plushie", "plastic", "toy")  # "a" throughout


def _openai_templates() -> tuple[str, ...]:
    templates = [f"a photo of {which} {{}}." for which in ("many", "one", "my")]
    templates.append("itap of my {}.")
    for article in ("a", "the"):
        templates += [f"{said} {article} {{}}." for said in _SAID_OF_BOTH]
        templates += [f"a photo of {article} {state} {{}}." for state in _STATES]
        templates += [f"{article} {kind} {{}}." for kind in _KINDS]
        templates.append(f"{article} {{}} in a video game.")
    return tuple(templates)


OPENAI_TEMPLATES: tuple[str, ...] = _openai_templates()

# SHA-256 of the published names, one per line in label order (sorted wnids, tench first).
PUBLISHED_NAMES = "571ae1c583b4be7da87519494c52bf405a46af05d5815627c7a0dee997068b60"


@functools.cache
def imagenet_classes(path: str) -> tuple[tuple[str, str], ...]:
    """The 1,000 classes of a file, `<wnid> <name>` a line, in label order: (wnid, name).

    Raises:
      DataError: no such file, a line of another form, or not 1,000 sorted wnids.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(
            f"ImageNet class names: expected a file {file}, found none; write the names that CLIP "
            "was evaluated with, one class per line as '<wnid> <name>', sorted by wnid "
            "(n01440764 tench first), or give its path as classes=…"
        )
    lines = file.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if not re.fullmatch(r"n\d{8} \S.*", line):
            raise DataError(f"{file}, line {number}: expected '<wnid> <name>', found {line!r}")
    classes = tuple((line[:9], line[10:].strip()) for line in lines)
    wnids = [wnid for wnid, _ in classes]
    if len(wnids) != 1000 or wnids != sorted(set(wnids)):
        raise DataError(
            f"{file}: expected 1,000 different wnids in ascending order, found {len(wnids)} lines"
            f"{'' if wnids == sorted(wnids) else ', not sorted'}; sort the file by wnid"
        )
    return classes


def are_published_names(classes: tuple[tuple[str, str], ...]) -> bool:
    """Whether the names are those that the published numbers were made with."""
    text = "\n".join(name for _, name in classes)
    return hashlib.sha256(text.encode()).hexdigest() == PUBLISHED_NAMES
