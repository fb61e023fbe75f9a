"""Class names and prompt templates of the published zero-shot protocols, as data files.

`openai_templates.txt` holds the 80 templates and `imagenet_classes.txt` the 1,000 class names that
were published with CLIP (MIT licence) and are used by the FG-CLIP evaluation; each class line is
`<wnid> <name>`, in the label order of ImageNet-1K (sorted wnids, tench first). The devkit numbers
the same classes in another order (kit fox first), which is not the label order.
"""

from __future__ import annotations

import functools
from pathlib import Path

_FOLDER = Path(__file__).parent


def _lines(name: str) -> tuple[str, ...]:
    return tuple((_FOLDER / name).read_text(encoding="utf-8").splitlines())


OPENAI_TEMPLATES: tuple[str, ...] = _lines("openai_templates.txt")


@functools.cache
def imagenet_classes() -> tuple[tuple[str, str], ...]:
    """The 1,000 classes in label order: (wnid, name)."""
    pairs = (line.split(" ", 1) for line in _lines("imagenet_classes.txt"))
    return tuple((wnid, name) for wnid, name in pairs)
