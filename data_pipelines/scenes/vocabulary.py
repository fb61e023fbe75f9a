"""Words and colours of the scene world, in English and Chinese.

Every attribute value has a canonical English name (the key of a table here, used in the scene
graph) and, per language, one or more words; the first word of each tuple is the canonical one,
used for class names and for the changed attribute of hard negatives.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeAlias, get_args

Language: TypeAlias = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = get_args(Language)


@dataclasses.dataclass(frozen=True, slots=True)
class Words:
    """Words for one attribute value or thing, canonical word first."""

    en: tuple[str, ...]
    zh: tuple[str, ...]

    def of(self, language: Language) -> tuple[str, ...]:
        """Words in `language`."""
        return self.en if language == "en" else self.zh


@dataclasses.dataclass(frozen=True, slots=True)
class Noun(Words):
    """An object class: its nouns and the Chinese measure word it takes."""

    measure: str = "个"


@dataclasses.dataclass(frozen=True, slots=True)
class Setting(Words):
    """A background: phrases that complete "... on a wooden table" (`en`, `zh`, with preposition),
    and whole sentences that open a long caption."""

    opening_en: tuple[str, ...] = ()
    opening_zh: tuple[str, ...] = ()

    def opening(self, language: Language) -> tuple[str, ...]:
        """Opening sentences in `language`."""
        return self.opening_en if language == "en" else self.opening_zh


OBJECTS: dict[str, Noun] = {
    "ball": Noun(("ball", "sphere"), ("球", "圆球")),
    "cube": Noun(("cube",), ("立方体", "方块")),
    "cone": Noun(("cone",), ("圆锥", "锥体")),
    "pyramid": Noun(("pyramid",), ("金字塔",), "座"),
    "cylinder": Noun(("cylinder",), ("圆柱", "圆柱体")),
    "ring": Noun(("ring",), ("圆环",)),
    "star": Noun(("star",), ("星星",), "颗"),
    "heart": Noun(("heart",), ("爱心", "心形"), "颗"),
    "cross": Noun(("cross",), ("十字", "十字架")),
    "moon": Noun(("moon", "crescent moon"), ("月亮", "月牙")),
    "kite": Noun(("kite",), ("风筝",), "只"),
    "tree": Noun(("tree",), ("树",), "棵"),
    "house": Noun(("house",), ("房子", "房屋"), "座"),
    "mushroom": Noun(("mushroom",), ("蘑菇",), "朵"),
    "fish": Noun(("fish",), ("鱼",), "条"),
    "bottle": Noun(("bottle",), ("瓶子",)),
    "mug": Noun(("mug", "cup"), ("杯子", "马克杯"), "只"),
    "balloon": Noun(("balloon",), ("气球",), "只"),
    "boat": Noun(("boat", "sailing boat"), ("帆船",), "艘"),
    "bell": Noun(("bell",), ("铃铛",), "只"),
    "flower": Noun(("flower",), ("花", "花朵"), "朵"),
    "umbrella": Noun(("umbrella",), ("雨伞",), "把"),
}

COLOURS: dict[str, Words] = {
    "red": Words(("red",), ("红色",)),
    "orange": Words(("orange",), ("橙色",)),
    "yellow": Words(("yellow",), ("黄色",)),
    "green": Words(("green",), ("绿色",)),
    "blue": Words(("blue",), ("蓝色",)),
    "purple": Words(("purple",), ("紫色",)),
    "pink": Words(("pink",), ("粉色",)),
    "brown": Words(("brown",), ("棕色",)),
    "black": Words(("black",), ("黑色",)),
    "white": Words(("white",), ("白色",)),
}

TEXTURES: dict[str, Words] = {
    "plain": Words(("plain",), ("纯色",)),
    "striped": Words(("striped",), ("条纹",)),
    "dotted": Words(("dotted", "spotted"), ("圆点", "波点")),
    "checked": Words(("checked", "chequered"), ("格子",)),
    "wooden": Words(("wooden",), ("木制", "木质")),
    "metal": Words(("metal", "metallic"), ("金属",)),
}

SIZES: dict[str, Words] = {
    "small": Words(("small", "little"), ("小", "小小")),
    "large": Words(("large", "big"), ("大", "大大")),
}

SETTINGS: dict[str, Setting] = {
    "table": Setting(
        ("on a wooden table", "on a table by a wall"),
        ("在木桌上", "在墙边的桌上"),
        (
            "A wooden table stands in front of a painted wall.",
            "The picture shows a wooden table against a plain wall.",
        ),
        ("一张木桌摆在一面粉刷过的墙前。", "画面中是一张靠墙的木桌。"),
    ),
    "meadow": Setting(
        ("in a green meadow", "on the grass"),
        ("在绿草地上", "在草坪上"),
        (
            "A green meadow stretches out under a sky with clouds.",
            "This is a grassy meadow on a bright day.",
        ),
        ("一片绿草地在多云的天空下铺展开来。", "这是晴天里的一片草坪。"),
    ),
    "beach": Setting(
        ("on a sandy beach", "on the sand by the sea"),
        ("在沙滩上", "在海边的沙地上"),
        (
            "A sandy beach lies in front of the calm sea.",
            "The scene is a beach with yellow sand and the sea behind.",
        ),
        ("一片沙滩，后面是平静的大海。", "画面是海边的沙地，远处是大海。"),
    ),
    "snow": Setting(
        ("in the snow", "on a snowy field"),
        ("在雪地上", "在白雪中"),
        (
            "A snowy field lies before distant mountains.",
            "It is winter and snow covers the ground below the mountains.",
        ),
        ("一片雪地，远处是群山。", "冬天，山下的地面盖满了白雪。"),
    ),
    "tiles": Setting(
        ("on a tiled floor", "on floor tiles by a brick wall"),
        ("在瓷砖地上", "在砖墙前的地砖上"),
        (
            "A tiled floor leads up to a brick wall.",
            "The scene is a room with floor tiles and a brick wall.",
        ),
        ("瓷砖地面一直铺到一面砖墙前。", "房间里铺着地砖，后面是砖墙。"),
    ),
    "night": Setting(
        ("under a starry sky", "outside at night"),
        ("在星空下", "在夜里的户外"),
        (
            "It is night, and stars shine over a dark field.",
            "A dark field lies under a starry sky.",
        ),
        ("夜里，群星照着昏暗的田野。", "昏暗的田野上是一片星空。"),
    ),
    "desert": Setting(
        ("in the desert", "on the desert sand at sunset"),
        ("在沙漠里", "在夕阳下的沙漠中"),
        (
            "The sun sets behind the dunes of a desert.",
            "This is a desert with dunes in the evening light.",
        ),
        ("太阳落到沙漠的沙丘后面。", "这是傍晚的沙漠和沙丘。"),
    ),
    "carpet": Setting(
        ("on a carpet", "on a soft rug in a room"),
        ("在地毯上", "在房间的毯子上"),
        (
            "A soft carpet covers the floor of a room with wallpaper.",
            "The scene is a room with a patterned rug and papered walls.",
        ),
        ("房间里铺着柔软的地毯，墙上贴着墙纸。", "画面是一个铺着花毯、贴着墙纸的房间。"),
    ),
}

# Linear mixing happens in these display values (0..1 RGB).
RGB: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.12, 0.12),
    "orange": (0.99, 0.50, 0.05),
    "yellow": (0.98, 0.85, 0.15),
    "green": (0.15, 0.62, 0.22),
    "blue": (0.12, 0.36, 0.88),
    "purple": (0.52, 0.20, 0.72),
    "pink": (0.99, 0.56, 0.74),
    "brown": (0.45, 0.26, 0.12),
    "black": (0.10, 0.10, 0.12),
    "white": (0.95, 0.95, 0.94),
}

_TEMPLATES: dict[Language, tuple[str, ...]] = {
    "en": (
        "a picture of a {}.",
        "a photo of a {}.",
        "a scene with a {}.",
        "there is a {} here.",
        "a {}.",
        "the {}.",
        "a small {}.",
        "a large {}.",
    ),
    "zh": (
        "一张{}的图片。",
        "一张{}的照片。",
        "画面里有{}。",
        "这里有{}。",
        "{}。",
        "一个小的{}。",
        "一个大的{}。",
    ),
}


def check_language(language: str) -> Language:
    """Return `language` when it is known.

    Raises:
      ValueError: not one of `LANGUAGES`.
    """
    for known in LANGUAGES:
        if language == known:
            return known
    raise ValueError(
        f"language: expected one of {', '.join(LANGUAGES)}, found {language!r}; "
        "use 'en' for English or 'zh' for Chinese"
    )


def class_names(language: Language = "en") -> tuple[str, ...]:
    """Names of the object classes (the labels of regions), in the fixed order of `OBJECTS`."""
    return tuple(noun.of(language)[0] for noun in OBJECTS.values())


def coloured_name(colour: str, kind: str, language: Language = "en") -> str:
    """Colour with class ("red ball", "红色球"), of keys of `COLOURS` and `OBJECTS`."""
    space = " " if language == "en" else ""
    return f"{COLOURS[colour].of(language)[0]}{space}{OBJECTS[kind].of(language)[0]}"


def coloured_class_names(language: Language = "en") -> tuple[str, ...]:
    """`coloured_name` of everything, colours within classes, both in table order."""
    return tuple(coloured_name(colour, kind, language) for kind in OBJECTS for colour in COLOURS)


def templates(language: Language = "en") -> tuple[str, ...]:
    """Prompt templates for zero-shot classification, with one `{}` for a class name."""
    return _TEMPLATES[language]
