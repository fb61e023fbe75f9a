"""A folder to start IAA from: a Llama and a CLIP, as they are published, under IAA's key names.

    python -m jaxmods.systems.iaa.assemble --llama Meta-Llama-3-8B-Instruct \
        --clip clip-vit-large-patch14-336 --out weights/iaa-start

Nothing is computed or held: tensors are copied one after the other. Branches are made when the
folder is imported (`Iaa.complete_import`). Of CLIP only the vision tower is taken.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from jaxmods.systems.iaa.weights import VISION
from jaxmods.weights import WeightError, open_weights
from jaxmods.weights.convert import SHARD_BYTES
from jaxmods.weights.writer import new_folder, write_sharded

_BESIDE = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json",
)  # fmt: skip


def assemble(
    llama: str | Path, clip: str | Path, out: str | Path, *, max_shard_bytes: int = SHARD_BYTES
) -> dict[str, list[str]]:
    """Writes the folder `out`, with the tokenizer and `config.json` of `llama`.

    Returns:
      Keys by file name.

    Raises:
      WeightError: a folder without weights or of another kind, or `out` is taken.
    """
    with open_weights(llama) as base, open_weights(clip) as tower:
        vision = {k: v for k, v in tower.tensors.items() if k.startswith("vision_model.")}
        if "model.embed_tokens.weight" not in base.tensors:
            raise WeightError(
                f"{llama}: expected a LlamaForCausalLM, found {sorted(base.tensors)[:3]}..."
            )
        if "vision_model.pre_layrnorm.weight" not in vision:
            raise WeightError(f"{clip}: expected a CLIP, found {sorted(tower.tensors)[:3]}...")
        tensors = {**base.tensors, **{VISION + k: v for k, v in vision.items()}}
        with new_folder(Path(out), False, sum(t.nbytes for t in tensors.values())) as work:
            files = write_sharded(work, tensors, max_shard_bytes=max_shard_bytes)
            for name in _BESIDE:
                if (Path(llama) / name).is_file():
                    shutil.copyfile(Path(llama) / name, work / name)
    return files


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name in ("--llama", "--clip", "--out"):
        parser.add_argument(name, required=True, metavar="FOLDER")
    options = parser.parse_args()
    files = assemble(options.llama, options.clip, options.out)
    print(f"wrote {sum(map(len, files.values()))} tensors to {options.out}")


if __name__ == "__main__":
    main()
