"""Token sequences from any model with a step function: greedy, sampled, beam search, streamed."""

from jaxmods.generation.beam import Beams, beam_search
from jaxmods.generation.loop import Generated, Limits, Step, generate, stream
from jaxmods.generation.sampling import GREEDY, Sampling, choose, filtered

__all__ = [
    "GREEDY",
    "Beams",
    "Generated",
    "Limits",
    "Sampling",
    "Step",
    "beam_search",
    "choose",
    "filtered",
    "generate",
    "stream",
]
