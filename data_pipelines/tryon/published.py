"""The published try-on sets in their layouts: VITON-HD, DressCode, FashionTryOn, ViViD, IGPair,
pictures in the wild, and the combination that RefTON's mixed model is trained on.

Folder and naming rules are those of the official loaders (360CVGroup/RefTon, `datasets_util/`,
commit 4d07a0a; the generated `person` and `image_ref` pictures are its VRF data). Differences, all
of them towards what a picture shows:

* Masks and DensePose pictures are optional everywhere (the released data comes without them).
* Unpaired FashionTryOn and ViViD take the reference of the *garment*; the official combined loader
  takes the one of the person's photo, which shows another garment. Unpaired IGPair has none.
* A set that is asked for and not there is an error, not a smaller training set.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from data_pipelines.batch import DataError
from data_pipelines.records import TryOnRecord
from data_pipelines.sources.base import digest
from data_pipelines.tryon.source import (
    CATEGORIES,
    FOLDERS,
    PARTS,
    Entry,
    Files,
    FolderSource,
    Part,
    TryOnSource,
    category_rows,
    first_folder,
    pictures_in,
    read_list,
    renamed,
)

Split: TypeAlias = Literal["train", "test"]
Pairs: TypeAlias = Literal["paired", "unpaired"]
SetName: TypeAlias = Literal["viton", "dresscode", "fashiontryon", "vivid", "igpair"]


@dataclasses.dataclass(frozen=True)
class VitonHd(FolderSource):
    """VITON-HD (11,647 / 2,032), as RefTON's processed tree or as the published archive.

      <root>/{train,test}/{image,cloth,person,image_ref,agnostic,agnostic_refined}/NAME.jpg
      <root>/{train,test}/agnostic_mask/STEM_mask.png, dense/STEM.png
      <root>/{train,test}/{train,test}_pairs.txt, or <root>/{train,test}_pairs.txt

    Paired: every picture of `image/` with the garment (and reference) of the same name. Unpaired:
    the lines "person garment" of the list. The archive's names agnostic-v3.2, agnostic-mask and
    image-densepose are read as well.

    Attributes:
      split, pairs: which part, and which list.
      refined: share of `agnostic_refined/` among the agnostic pictures that training draws; the
        combined recipe has 0.5, the single one 0.
      use_person: read `person/`; None reads it in train only, as the official loader does (a paired
        mask-free test then shows the model the target photo itself, see `TryOnPipeline`).
    """

    _: dataclasses.KW_ONLY
    split: Split = "train"
    pairs: Pairs = "paired"
    refined: float = 0.0
    use_person: bool | None = None

    @property
    def name(self) -> str:
        return f"viton-hd/{self.split}{_unpaired(self.pairs)}"

    def _list(self) -> list[Entry]:
        part = self.folder / self.split
        if self.pairs == "paired":
            return [Entry(n, n, self.split, "upper") for n in pictures_in(part / "image")]
        name = f"{self.split}_pairs.txt"
        path = _first_file(self.name, part / name, self.folder / name)
        return [Entry(p, g, self.split, "upper", False) for p, g in read_list(path, (2,))]

    def _files(self, entry: Entry) -> Files:
        part, stem = self.folder / entry.folder, Path(entry.person).stem
        agnostics, maps, dense = self._folders
        return Files(
            garment=part / "cloth" / entry.garment,
            target=part / "image" / entry.person,
            person=_person(part, entry.person, self.split, self.use_person),
            agnostic=tuple(folder / entry.person for folder in agnostics),
            reference=part / "image_ref" / entry.garment,
            mask=maps / f"{stem}_mask.png",
            dense=dense / (entry.person if dense.name == "image-densepose" else f"{stem}.png"),
        )

    @functools.cached_property
    def _folders(self) -> tuple[tuple[Path, ...], Path, Path]:
        """Agnostic variants, masks, DensePose: by RefTON's names or the archive's."""
        part = self.folder / self.split
        plain = first_folder(part, ("agnostic", "agnostic-v3.2"))
        return (
            (plain, part / "agnostic_refined") if self.refined else (plain,),
            first_folder(part, ("agnostic_mask", "agnostic-mask")),
            first_folder(part, ("dense", "image-densepose")),
        )

    def _shares(self) -> tuple[float, ...]:
        return (1 - self.refined, self.refined) if self.refined else ()


@dataclasses.dataclass(frozen=True)
class DressCode(FolderSource):
    """DressCode (48,392 / 5,400; upper, lower, dresses) with RefTON's additions.

      <root>/{upper_body,lower_body,dresses}/images/NNNNNN_0.jpg (photo), NNNNNN_1.jpg (garment)
      .../{person,image_ref}/NNNNNN_0.jpg, {agnostic_catvton,agnostic_enhanced}/NNNNNN_6.jpg
      .../agnostic_masks_catvton/NNNNNN_3.png, dense/NNNNNN_5.png
      <root>/train_pairs.txt, test_pairs_paired.txt, {train,test}_pairs_unpaired.txt: lines
        "person garment category" (0 upper, 1 lower, 2 dresses); or the same files in each
        category's folder with lines "person garment", as the set itself has them.

    Attributes:
      split, pairs: which part, and which list.
      categories: keep these.
      enhanced: share of `agnostic_enhanced/` among the agnostic pictures that training draws; the
        combined recipe has 0.25, the single one 0.
      use_person: see `VitonHd`.
    """

    _: dataclasses.KW_ONLY
    split: Split = "train"
    pairs: Pairs = "paired"
    categories: tuple[Literal["upper", "lower", "dresses"], ...] = CATEGORIES
    enhanced: float = 0.0
    use_person: bool | None = None

    @property
    def name(self) -> str:
        part = "" if self.categories == CATEGORIES else "/" + "+".join(self.categories)
        return f"dresscode/{self.split}{_unpaired(self.pairs)}{part}"

    def _list(self) -> list[Entry]:
        if self.pairs == "unpaired":
            name = f"{self.split}_pairs_unpaired.txt"
        else:
            name = "train_pairs.txt" if self.split == "train" else "test_pairs_paired.txt"
        rows = self._rows(name)
        return [
            Entry(person, garment, FOLDERS[c], CATEGORIES[c], self.pairs == "paired")
            for person, garment, c in rows
            if CATEGORIES[c] in self.categories
        ]

    def _rows(self, name: str) -> list[tuple[str, str, int]]:
        if (self.folder / name).is_file():
            return category_rows(self.folder / name)
        own = [(c, self.folder / folder / name) for c, folder in enumerate(FOLDERS)]
        rows = [(p, g, c) for c, path in own if path.is_file() for p, g in read_list(path, (2,))]
        if not rows:
            raise DataError(
                f"{self.name}: expected {self.folder / name} (3 columns) or {name} in each of "
                f"{', '.join(FOLDERS)} (2 columns), found neither; set data.source.root"
            )
        return rows

    def _files(self, entry: Entry) -> Files:
        part = self.folder / entry.folder
        person = entry.person
        agnostic = renamed(person, "_0.jpg", "_6.jpg")
        variants = ("agnostic_catvton", *(("agnostic_enhanced",) if self.enhanced else ()))
        return Files(
            garment=part / "images" / entry.garment,
            target=part / "images" / person,
            person=_person(part, person, self.split, self.use_person),
            agnostic=tuple(part / variant / agnostic for variant in variants),
            reference=part / "image_ref" / renamed(entry.garment, "_1.jpg", "_0.jpg"),
            mask=part / "agnostic_masks_catvton" / renamed(person, "_0.jpg", "_3.png"),
            dense=part / "dense" / renamed(person, "_0.jpg", "_5.png"),
        )

    def _shares(self) -> tuple[float, ...]:
        return (1 - self.enhanced, self.enhanced) if self.enhanced else ()


@dataclasses.dataclass(frozen=True)
class FashionTryOn(FolderSource):
    """FashionTryOn as RefTON processed it.

      <root>/{train,test}/{images,person,image_ref,agnostic,agnostic_enhanced}/NAME.jpg
      <root>/{train,test}/cloth/NNNNN.jpg (first five characters of the garment's photo)
      <root>/{train,test}/unpairs.txt: lines "person garment-photo"

    Attributes:
      split, pairs: which part; "unpaired" reads `unpairs.txt`.
      enhanced: share of `agnostic_enhanced/` (0.4 in the combined recipe).
    """

    _: dataclasses.KW_ONLY
    split: Split = "train"
    pairs: Pairs = "paired"
    enhanced: float = 0.0

    @property
    def name(self) -> str:
        return f"fashiontryon/{self.split}{_unpaired(self.pairs)}"

    def _list(self) -> list[Entry]:
        part = self.folder / self.split
        if self.pairs == "paired":
            return [Entry(n, n, self.split) for n in pictures_in(part / "images")]
        rows = read_list(_first_file(self.name, part / "unpairs.txt"), (2,))
        return [Entry(p, g, self.split, None, False) for p, g in rows]

    def _files(self, entry: Entry) -> Files:
        part = self.folder / entry.folder
        variants = ("agnostic", *(("agnostic_enhanced",) if self.enhanced else ()))
        return Files(
            garment=part / "cloth" / f"{entry.garment[:5]}.jpg",
            target=part / "images" / entry.person,
            person=part / "person" / entry.person,
            agnostic=tuple(part / variant / entry.person for variant in variants),
            reference=part / "image_ref" / entry.garment,
        )

    def _shares(self) -> tuple[float, ...]:
        return (1 - self.enhanced, self.enhanced) if self.enhanced else ()


@dataclasses.dataclass(frozen=True)
class _ByCategory(FolderSource):
    """Sets with a folder per category and `pairs.txt` / `unpairs.txt` of three columns."""

    _: dataclasses.KW_ONLY
    pairs: Pairs = "paired"

    def _list(self) -> list[Entry]:
        name = "pairs.txt" if self.pairs == "paired" else "unpairs.txt"
        rows = category_rows(_first_file(self.name, self.folder / name))
        return [Entry(p, g, FOLDERS[c], CATEGORIES[c], self.pairs == "paired") for p, g, c in rows]

    def _files(self, entry: Entry) -> Files:
        part = self.folder / entry.folder
        return Files(
            garment=part / "cloth" / entry.garment,
            target=part / "images" / entry.person,
            person=part / "person" / entry.person,
            agnostic=(part / "agnostic" / entry.person,),
            reference=self._reference(part, entry),
            mask=part / "agnostic_mask" / f"{Path(entry.person).stem}_mask.png",
            dense=part / "dense" / entry.person,
        )

    def _reference(self, part: Path, entry: Entry) -> Path | None:
        return part / "image_ref" / entry.person if entry.paired else None


@dataclasses.dataclass(frozen=True)
class ViViD(_ByCategory):
    """Frames of ViViD as RefTON processed them.

      <root>/{upper_body,lower_body,dresses}/{images,cloth,image_ref,person,agnostic,dense}/NAME
      <root>/pairs.txt, unpairs.txt: lines "person garment category"

    Unpaired, the reference is the first picture of `image_ref/` whose name begins with the
    garment's number (`find_model_image` of the official loader).
    """

    @property
    def name(self) -> str:
        return f"vivid{_unpaired(self.pairs)}"

    def _reference(self, part: Path, entry: Entry) -> Path | None:
        folder = part / "image_ref"
        if entry.paired:
            return folder / entry.person
        number = Path(entry.garment).stem.split("_")[0]
        name = _by_number(folder).get(number)
        return folder / name if name is not None else folder / f"{number}_"


@dataclasses.dataclass(frozen=True)
class IgPair(_ByCategory):
    """IGPair as RefTON processed it: folders as ViViD, with `agnostic_mask/`.

    Attributes:
      skip: entries left out from the beginning of the list. The stand-alone official loader leaves
        out 8,000, the combined one (used for training) none.
    """

    _: dataclasses.KW_ONLY
    skip: int = 0

    @property
    def name(self) -> str:
        return f"igpair{_unpaired(self.pairs)}"

    def _list(self) -> list[Entry]:
        return super()._list()[self.skip :]


@dataclasses.dataclass(frozen=True)
class InTheWild(FolderSource):
    """Own pictures in folders: `cloth/` is required; `images/` (target), `person/`, `agnostic/`
    and `image_ref/` are optional, with the same file names."""

    @property
    def name(self) -> str:
        return f"wild/{self.folder.name}"

    def _list(self) -> list[Entry]:
        return [Entry(n, n) for n in pictures_in(self.folder / "cloth")]

    def _files(self, entry: Entry) -> Files:
        images = self.folder / "images"
        return Files(
            garment=self.folder / "cloth" / entry.garment,
            target=images / entry.person if images.is_dir() else None,
            person=self.folder / "person" / entry.person,
            agnostic=(self.folder / "agnostic" / entry.person,),
            reference=self.folder / "image_ref" / entry.person,
        )


@dataclasses.dataclass(frozen=True)
class Combined(TryOnSource):
    """RefTON's mixed training set: the sets one after the other, shuffled as one.

      <root>/{viton,DressCode,FashionTryOn_processed,vivid_processed,IGPair_processed}/

    Every record has the same weight, whatever set it is from. Agnostic variants are drawn with the
    official shares: VITON-HD 50 % refined, DressCode 25 % and FashionTryOn 40 % enhanced.

    Attributes:
      root: folder that holds the sets.
      sets: which of them; each has to be there.
      split: "train" or "test" (ViViD and IGPair have one part only).
    """

    root: str
    _: dataclasses.KW_ONLY
    sets: tuple[SetName, ...] = get_args(SetName)
    split: Split = "train"

    @property
    def name(self) -> str:
        every = self.sets == get_args(SetName)
        return f"combined/{self.split}{'' if every else '/' + '+'.join(self.sets)}"

    @functools.cached_property
    def parts(self) -> tuple[FolderSource, ...]:
        """One source per set."""
        root, split, train = Path(self.root).expanduser(), self.split, self.split == "train"
        made: dict[SetName, FolderSource] = {
            "viton": VitonHd(
                str(root / "viton"), split=split, refined=0.5 * train, use_person=True
            ),
            "dresscode": DressCode(
                str(root / "DressCode"), split=split, enhanced=0.25, use_person=True
            ),
            "fashiontryon": FashionTryOn(
                str(root / "FashionTryOn_processed"), split=split, enhanced=0.4 * train
            ),
            "vivid": ViViD(str(root / "vivid_processed")),
            "igpair": IgPair(str(root / "IGPair_processed")),
        }
        parts = tuple(made[name] for name in self.sets)
        absent = [p for p in parts if not p.folder.is_dir()]
        if absent:
            raise DataError(
                f"{self.name}: expected {', '.join(p.folder.name for p in parts)} under {root}, "
                f"missing {', '.join(p.folder.name for p in absent)}; name those that are there in "
                f"data.source.sets ({', '.join(get_args(SetName))})"
            )
        return parts

    @functools.cached_property
    def _ends(self) -> tuple[int, ...]:
        return tuple(itertools.accumulate(len(p) for p in self.parts))

    def _place(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: expected 0 <= index < {len(self)}, found {index}")
        part = bisect.bisect_right(self._ends, index)
        return part, index - (self._ends[part - 1] if part else 0)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> TryOnRecord:
        part, row = self._place(index)
        record = self.parts[part][row]
        return dataclasses.replace(record, id=f"{self.sets[part]}/{record.id}")

    def record_id(self, index: int) -> str:
        part, row = self._place(index)
        return f"{self.sets[part]}/{self.parts[part].record_id(row)}"

    def offers(self) -> frozenset[Part]:
        """What every set has."""
        return frozenset(PARTS).intersection(*(p.offers() for p in self.parts))

    def looked_for(self, part: Part) -> str:
        return "; ".join(p.looked_for(part) for p in self.parts if part not in p.offers())

    def report(self) -> dict[str, int]:
        found = {"records": len(self)}
        for name, part in zip(self.sets, self.parts, strict=True):
            found.update({f"{name}_{k}": v for k, v in part.report().items()})
        return found

    def fingerprint(self) -> str:
        return digest(self.name, [p.fingerprint() for p in self.parts])


def _unpaired(pairs: Pairs) -> str:
    return "/unpaired" if pairs == "unpaired" else ""


def _person(part: Path, name: str, split: Split, wanted: bool | None) -> Path | None:
    use = split == "train" if wanted is None else wanted
    return part / "person" / name if use else None


def _first_file(source: str, *options: Path) -> Path:
    for path in options:
        if path.is_file():
            return path
    raise DataError(
        f"{source}: expected the pair list {' or '.join(map(str, options))}, found none; set "
        "data.source.root"
    )


@functools.lru_cache(maxsize=8)
def _by_number(folder: Path) -> dict[str, str]:
    """First picture of each number ("00012_3.jpg" has 00012), names in sorted order."""
    found: dict[str, str] = {}
    for name in pictures_in(folder) if folder.is_dir() else []:
        if "_" in name:
            found.setdefault(name.split("_")[0], name)
    return found
