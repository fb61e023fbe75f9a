"""Diffusion and flow matching for any system: noise levels, training targets, samplers, guidance.

* `densities`: which noise levels training draws, and how it weights the loss there
* `flow`: rectified flow (noising, velocity, loss), tables of levels, their shift by size
* `sampling`: the loop, and one-step solvers as tables
* `guidance`: classifier-free, distilled, by a weaker model

Everything is pure: randomness comes in as keys, tables are made on the host in the precision of the
official code, noise levels and updates are float32 whatever the model computes in.
"""

from jaxmods.diffusion.densities import Density, Weighting, loss_weight, scheme
from jaxmods.diffusion.flow import (
    FlowSchedule,
    FlowTimes,
    add_noise,
    clean_from,
    shift_exponential,
    shift_linear,
    shift_static,
    velocity,
    velocity_loss,
)
from jaxmods.diffusion.guidance import classifier_free, distilled, guide
from jaxmods.diffusion.sampling import At, Model, OneStep, Solver, euler, sample, step

__all__ = [
    "At",
    "Density",
    "FlowSchedule",
    "FlowTimes",
    "Model",
    "OneStep",
    "Solver",
    "Weighting",
    "add_noise",
    "classifier_free",
    "clean_from",
    "distilled",
    "euler",
    "guide",
    "loss_weight",
    "sample",
    "scheme",
    "shift_exponential",
    "shift_linear",
    "shift_static",
    "step",
    "velocity",
    "velocity_loss",
]
