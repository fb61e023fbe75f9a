"""Adapter files of the PyTorch world, in and out.

    dialect     file                              key of q in block 0                        scale
    peft        adapter_model.safetensors         base_model.model.blocks.0.q.lora_A.weight  config
                + adapter_config.json
    diffusers   pytorch_lora_weights.safetensors  transformer.blocks.0.q.lora_A.weight       header
    kohya       any                               lora_unet_blocks_0_q.lora_down.weight      .alpha

Names of modules come from the weight map of the model (`Published`), so any of its published
layouts may occur in any dialect: FLUX in kohya files has the names and the fused projections of the
original code, in diffusers files those of diffusers. Reading recognises each key by looking it up
under every name that its module can have; a key without a module is an error, never skipped.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxmods.nn.lora.adapters import DEFAULT, LoraConfig, beside
from jaxmods.nn.lora.modules import Module, Pair, Published, modules, to_factors
from jaxmods.system import Params
from jaxmods.weights.errors import WeightError
from jaxmods.weights.lazy import Lazy
from jaxmods.weights.map import unflatten
from jaxmods.weights.reader import WeightReader, open_weights

Dialect = Literal["peft", "diffusers", "kohya"]
AlphaFrom = Literal["metadata", "config", "keys", "given", "assumed"]

PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"

_DOWN, _UP, _ALPHA = "down", "up", "alpha"
_KEYS = (
    (re.compile(r"(.+)\.lora_A(?:\.[^.]+)?\.weight"), _DOWN),
    (re.compile(r"(.+)\.lora_B(?:\.[^.]+)?\.weight"), _UP),
    (re.compile(r"(.+)\.lora[._]down\.weight"), _DOWN),
    (re.compile(r"(.+)\.lora[._]up\.weight"), _UP),
    (re.compile(r"(.+)\.alpha"), _ALPHA),
)
_OTHER_KINDS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_w": "LoHa",
    "lokr_": "LoKr",
    "lora_mid": "a Tucker-decomposed convolution",
    "lora_embedding": "an adapted embedding",
    "processor.": "attention processors of XLabs or of old diffusers",
    "norm.scale": "trained norms",
    ".bias": "trained biases",
}


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Adapters from a file.

    Attributes:
      adapters: `{name: tree}` of float32 NumPy arrays.
      config: the file's rank, scale and dropout, with the exact paths as targets.
      dialect: of most keys.
      alpha_from: where the scale was stated: "metadata" of the header, "config" beside the file,
        "keys" (one alpha per module), "given" by the caller, or "assumed" (nothing stated, so
        alpha = rank and the scale 1, as diffusers does).
      modules: how many modules the file adapts.
      ignored: keys that were left out because the caller said so.
    """

    adapters: Params
    config: LoraConfig
    dialect: Dialect
    alpha_from: AlphaFrom
    modules: int
    ignored: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Stated:
    """What a config or a header says of the scale."""

    alpha: float | None = None
    rslora: bool = False
    dropout: float = 0.0
    alphas: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def scale(self, module: str, rank: int) -> float:
        alpha = self.alpha
        for pattern, value in self.alphas.items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                alpha = value
                break
        alpha = rank if alpha is None else alpha
        return alpha / rank**0.5 if self.rslora else alpha / rank


def load(
    source: str | Path | WeightReader,
    base: Params,
    published: Sequence[Published],
    *,
    name: str = DEFAULT,
    alpha: float | None = None,
    ignore: Sequence[str] = (),
) -> Loaded:
    """Adapters from a file in any dialect.

    Where modules differ in scale, the most common one becomes the config's, and the others' ratio
    to it is multiplied into their `b`.

    Args:
      source: a folder, a weight file (an `adapter_config.json` beside it is read), or an open
        reader.
      base: parameters of the model or their abstract form; gives paths and shapes.
      published: the model's names: every layout in which it is published, every part of it.
      name: of the adapter here.
      alpha: takes the place of what the file says of its scale, or does not say.
      ignore: shell patterns of keys that may be there and are not for this model
        ("text_encoder.*").

    Raises:
      WeightError: not every key belongs to a module of the model; sizes of another model; half of
        a pair; what is no plain LoRA.
    """
    reader = source if isinstance(source, WeightReader) else open_weights(weight_file(Path(source)))
    ignored = tuple(k for k in reader.tensors if any(fnmatchcase(k, p) for p in ignore))
    tensors = {k: t for k, t in reader.tensors.items() if k not in set(ignored)}
    known = [modules(names, base) for names in published]
    halves, dialect = _recognise(reader.source, tensors, published, known)
    stated, origin = _read_statement(source, reader, published)

    pairs, scales = [], []
    for (part, module_name), found in halves.items():
        module = known[part][module_name]
        A, B = _pair(reader.source, found, module)
        pairs.append((module, (A, B)))
        if alpha is not None:
            scales.append(alpha / A.shape[0])
        elif origin is None and _ALPHA in found:
            scales.append(float(found[_ALPHA].all()) / A.shape[0])
        else:
            scales.append(stated[part].scale(module_name, A.shape[0]))
    if alpha is not None:
        origin = "given"
    elif origin is None:
        origin = "keys" if any(_ALPHA in found for found in halves.values()) else "assumed"

    rank = Counter(A.shape[0] for _, (A, _) in pairs).most_common(1)[0][0]
    scale = Counter(scales).most_common(1)[0][0]
    equal = [
        (module, (A, B if own == scale else B * np.float32(own / scale)))
        for (module, (A, B)), own in zip(pairs, scales, strict=True)
    ]
    factors = to_factors(equal, base)
    leaves = {}
    for path, found_here in factors.items():
        leaves[beside(path, "a")], leaves[beside(path, "b")] = found_here.a, found_here.b
    statement = stated[next(iter(halves))[0]]
    rslora = statement.rslora and origin != "given"
    config = LoraConfig(
        tuple(factors),
        rank,
        scale * (rank**0.5 if rslora else rank),
        statement.dropout,
        rslora,
    )
    return Loaded({name: unflatten(leaves)}, config, dialect, origin, len(pairs), ignored)


def weight_file(path: Path) -> Path:
    """The weight file of a folder, by the names of the dialects; else whatever is there alone."""
    for name in (PEFT_FILE, DIFFUSERS_FILE):
        if path.is_dir() and (path / name).exists():
            return path / name
    return path


_Key = tuple[int, str]  # number of the Published, name of the module


def _recognise(
    source: str,
    tensors: Mapping[str, Lazy],
    published: Sequence[Published],
    known: Sequence[Mapping[str, Module]],
) -> tuple[dict[_Key, dict[str, Lazy]], Dialect]:
    """The tensors of every module by what they are, and the dialect of most keys."""
    names: dict[str, tuple[_Key, Dialect]] = {}
    for part, (of, found) in enumerate(zip(published, known, strict=True)):
        for module in found:
            for full, dialect in _names(of, module).items():
                names.setdefault(full, ((part, module), dialect))
    halves: dict[_Key, dict[str, Lazy]] = {}
    spoken: Counter[Dialect] = Counter()
    strange = []
    for key, tensor in tensors.items():
        for pattern, half in _KEYS:
            match = pattern.fullmatch(key)
            if match and match.group(1) in names:
                owner, dialect = names[match.group(1)]
                mine = halves.setdefault(owner, {})
                if half in mine:
                    raise WeightError(
                        f"{source}: expected one adapter, found two tensors for {owner[1]}: "
                        f"{mine[half].name} and {key}; split the file"
                    )
                mine[half] = tensor
                spoken[dialect] += 1
                break
        else:
            strange.append(key)
    if strange:
        raise WeightError(_strangers(source, strange, len(tensors), names))
    if not halves:
        raise WeightError(f"{source}: expected the tensors of adapters, found none")
    return halves, spoken.most_common(1)[0][0]


def _names(published: Published, module: str) -> dict[str, Dialect]:
    """Every name that files have for a module, with the dialect."""
    return {
        f"base_model.model.{module}": "peft",
        f"{published.component}.{module}": "diffusers",
        f"{published.component}.module.{module}": "diffusers",
        f"diffusion_model.{module}": "diffusers",
        f"model.diffusion_model.{module}": "diffusers",
        module: "diffusers",
        kohya_name(published, module): "kohya",
    }


def kohya_name(published: Published, module: str) -> str:
    """What kohya's files call a module."""
    return f"{published.kohya}_{module.replace('.', '_')}"


def _strangers(source: str, strange: Sequence[str], total: int, names: Mapping[str, Any]) -> str:
    """The message about keys that belong to no module."""

    def prefix(key: str) -> str:
        if match := re.match(r"lora_[a-z]+\d*", key):
            return match.group()
        return ".".join(key.split(".")[:2])

    groups = Counter(prefix(key) for key in strange)
    listed = ", ".join(f"{group}... ({n})" for group, n in groups.most_common(6))
    kinds = dict.fromkeys(
        kind for mark, kind in _OTHER_KINDS.items() if any(mark in key for key in strange)
    )
    hint = f"; these look like {' and '.join(kinds)}, which is not supported" if kinds else ""
    which = "none of" if len(strange) == total else f"all but {len(strange)} of"
    return (
        f"{source}: {which} its {total} keys belong to adapters of this model; unknown: {listed}, "
        f"as {strange[0]}{hint}; expected names such as {', '.join(list(names)[:2])}; give the "
        "file of this model, or name in `ignore` what is meant for another one"
    )


def _pair(source: str, found: Mapping[str, Lazy], module: Module) -> Pair:
    """A [r, in] and B [out, r] in float32, checked against the module."""
    if missing := [half for half in (_DOWN, _UP) if half not in found]:
        there = next(iter(found.values())).name
        raise WeightError(
            f"{source}: {module.name} has {there}, but no {missing[0]} matrix; the file is "
            "incomplete, fetch it again"
        )
    down, up = found[_DOWN], found[_UP]
    rank = down.shape[0] if down.shape else 0
    for tensor, expected in (
        (down, (rank, *module.shape[1:])),
        (up, (module.shape[0], rank)),
    ):
        if _squeezed(tensor.shape) != _squeezed(expected):
            raise WeightError(
                f"{source}: {tensor.name}: expected shape {list(expected)}, found "
                f"{list(tensor.shape)}; the file is for a model of another size, or its ranks do "
                "not agree"
            )
    A = down.all().astype(np.float32).reshape(rank, module.in_size)
    return A, up.all().astype(np.float32).reshape(module.out_size, rank)


def _squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    """Without trailing ones beyond two dimensions (1x1 convolutions)."""
    shape = tuple(shape)
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _read_statement(
    source: str | Path | WeightReader, reader: WeightReader, published: Sequence[Published]
) -> tuple[list[_Stated], AlphaFrom | None]:
    """What is said of the scale of each part, and where; nothing said gives None."""
    if METADATA in reader.metadata:
        fields = _json(reader.metadata[METADATA], f"{reader.source}: header {METADATA}")
        parts = [
            {
                key.removeprefix(f"{names.component}."): value
                for key, value in fields.items()
                if key.startswith(f"{names.component}.")
            }
            for names in published
        ]
        if any(parts):
            return [_statement(part, reader.source) for part in parts], "metadata"
    if not isinstance(source, WeightReader):
        path = Path(source) if Path(source).is_dir() else Path(source).parent
        if (path / PEFT_CONFIG).exists():
            text = (path / PEFT_CONFIG).read_text(encoding="utf-8")
            stated = _statement(_json(text, str(path / PEFT_CONFIG)), str(path / PEFT_CONFIG))
            return [stated] * len(published), "config"
    return [_Stated()] * len(published), None


def _json(text: str, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise WeightError(f"{where}: not valid JSON ({error}); fetch the file again") from None
    if not isinstance(fields, dict):
        raise WeightError(f"{where}: expected a JSON object, found {type(fields).__name__}")
    return fields


def _statement(fields: Mapping[str, Any], where: str) -> _Stated:
    """A PEFT config, of which only what changes the mathematics is read."""
    kind = fields.get("peft_type", "LORA")
    if kind != "LORA":
        raise WeightError(f"{where}: expected peft_type LORA, found {kind}; only LoRA is supported")
    for flag in ("use_dora", "fan_in_fan_out", "use_qalora", "lora_bias"):
        if fields.get(flag):
            raise WeightError(f"{where}: {flag} is set, which is not supported; only plain LoRA is")
    if fields.get("bias", "none") != "none":
        raise WeightError(f"{where}: expected bias 'none', found {fields['bias']!r}")
    return _Stated(
        fields.get("lora_alpha"),
        bool(fields.get("use_rslora", False)),
        float(fields.get("lora_dropout") or 0.0),
        dict(fields.get("alpha_pattern") or {}),
    )
