"""FG-CLIP: fine-grained visual and textual alignment (ICML 2025, arXiv 2505.05071)."""

from jaxmods.backbones.clip import Execution, TextConfig, VisionConfig
from jaxmods.systems.fgclip.model import BASE, LARGE, FgClipModel
from jaxmods.systems.fgclip.system import FgClip

__all__ = ["BASE", "LARGE", "Execution", "FgClip", "FgClipModel", "TextConfig", "VisionConfig"]
