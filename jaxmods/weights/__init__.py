"""Two-way weights: one declaration per model maps PyTorch tensors to a parameter tree and back.

    map = WeightMap((Entry("proj.weight", "proj/kernel", Linear()), ...))
    with open_weights("folder") as reader:
        params, missing = import_params(reader, map, abstract_params)

Reading is lazy and sharded, writing is streamed, both are strict. `docs/weights.md` is the guide.
"""

from jaxmods.weights.convert import (
    Exported,
    Imported,
    export_params,
    export_tensors,
    import_lazies,
    import_params,
    report,
)
from jaxmods.weights.errors import WeightError
from jaxmods.weights.map import Drop, Entry, WeightMap
from jaxmods.weights.reader import WeightReader, memory_reader, open_weights
from jaxmods.weights.report import Report
from jaxmods.weights.transforms import (
    BiasHeads,
    Cast,
    Conv1d,
    Conv2d,
    Conv3d,
    Fuse,
    Identity,
    Linear,
    LinearHeads,
    Permute,
    Reorder,
    Reshape,
    Split,
    Squeeze,
    Stack,
    Tie,
    Transform,
)

__all__ = [
    "BiasHeads",
    "Cast",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Drop",
    "Entry",
    "Exported",
    "Fuse",
    "Identity",
    "Imported",
    "Linear",
    "LinearHeads",
    "Permute",
    "Reorder",
    "Report",
    "Reshape",
    "Split",
    "Squeeze",
    "Stack",
    "Tie",
    "Transform",
    "WeightError",
    "WeightMap",
    "WeightReader",
    "export_params",
    "export_tensors",
    "import_lazies",
    "import_params",
    "memory_reader",
    "open_weights",
    "report",
]
