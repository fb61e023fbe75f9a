"""IAA: layers inserted into a frozen language model let it see and point (arXiv 2408.12902)."""

from jaxmods.systems.iaa.model import IAA_8, IAA_14, IaaModel
from jaxmods.systems.iaa.system import Iaa
from jaxmods.systems.iaa.weights import load_grounding

__all__ = ["IAA_8", "IAA_14", "Iaa", "IaaModel", "load_grounding"]
