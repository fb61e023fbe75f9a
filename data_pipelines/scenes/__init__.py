"""The scene world: a deterministic, procedural source of pictures with full ground truth.

`sample_scene(seed, index)` gives the graph, `render(scene, size)` its views; captions, regions and
layouts are functions of the same graph. `Scenes` is the source of image-text records.
"""

from data_pipelines.scenes.captions import long_caption, short_caption
from data_pipelines.scenes.graph import Scene, SceneObject, relation, sample_scene
from data_pipelines.scenes.regions import LayoutItem, layout, regions
from data_pipelines.scenes.render import Views, composite, render
from data_pipelines.scenes.source import HELD_OUT, Scenes
from data_pipelines.scenes.vocabulary import class_names, coloured_class_names, templates

__all__ = [
    "HELD_OUT",
    "LayoutItem",
    "Scene",
    "SceneObject",
    "Scenes",
    "Views",
    "class_names",
    "coloured_class_names",
    "composite",
    "layout",
    "long_caption",
    "regions",
    "relation",
    "render",
    "sample_scene",
    "short_caption",
    "templates",
]
