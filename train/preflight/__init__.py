"""Compile a recipe's step for a named TPU topology on any machine, and read what comes out.

    topologies   names of TPU slices, and their devices without the hardware
    chips        constants of the chips
    program      the real step, traced, lowered and compiled
    flops        counted from the traced program
    hlo          the compiled program as text, with loop trip counts
    memory       what lies in HBM and where the large buffers come from
    collectives  communication by kind and mesh axis
    model        step time from all of these: an estimate
    report       the result, as a table or JSON
    command      `jaxmods preflight`

`docs/preflight.md` explains every figure and its limits.
"""
