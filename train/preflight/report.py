"""The result of a preflight: one dataclass, as a table or JSON."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from typing import Any

from train.experiment import Experiment
from train.preflight import collectives, memory
from train.preflight import model as step_time
from train.preflight.advice import Suggestion, suggestions
from train.preflight.chips import GIB
from train.preflight.flops import Flops
from train.preflight.program import Compiled
from train.preflight.topologies import Topology

_NOTABLE_PADDING = 0.10  # of a buffer
_NOTABLE_BUFFER = 0.01  # of the capacity
_NOTABLE_SHARE = 0.001  # of all that is used


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All collectives of one kind over the same mesh axes.

    Attributes:
      axes: mesh axes, joined by "+"; "?" if unknown. size: devices per group.
      places: in the program. runs: per step. in_loops: runs inside loops.
      bytes: per device and step. overlapped: runs beside computation. dcn: crosses slices.
      low, high: seconds per step. source: of the place with most bytes.
    """

    kind: str
    axes: str
    size: int
    places: int
    runs: int
    in_loops: int
    bytes: float
    overlapped: bool
    dcn: bool
    low: float
    high: float
    source: str


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything that preflight says about one program on one mesh."""

    recipe: str
    what: str
    topology: Topology
    mesh: dict[str, int]
    split: bool
    batch: int
    memory: memory.Memory
    hardware: Flops
    model: Flops
    analytic: float | None
    kernels: tuple[step_time.Kernel, ...]
    traffic: tuple[Traffic, ...]
    estimate: step_time.Estimate | None
    hot: tuple[step_time.Hot, ...]
    advice: tuple[Suggestion, ...]
    steps: int | None
    warnings: tuple[str, ...]
    seconds: dict[str, float]
    versions: dict[str, str]

    @property
    def fits(self) -> bool:
        """Whether the compiler could place it."""
        return self.memory.fits

    def json(self) -> dict[str, Any]:
        """As JSON types. Bytes, seconds, operations; per device unless the name says otherwise."""
        t, chip = self.topology, self.topology.chip
        per_example = self.model.total / self.batch
        estimate = None
        if self.estimate is not None:
            e = self.estimate
            estimate = {
                **dataclasses.asdict(e),
                "run_seconds": [self.steps * s for s in (e.low, e.point, e.high)]
                if self.steps
                else None,
                "examples_per_second": [
                    self.batch / s if s else 0.0 for s in (e.high, e.point, e.low)
                ],
                "note": "estimates from the compiler's cycles and a model of the links",
            }
        return {
            "recipe": self.recipe,
            "what": self.what,
            "fits": self.fits,
            "topology": {
                "name": t.name,
                "product": t.product,
                "slices": t.slices,
                "chips": t.chips,
                "devices": t.devices,
                "hosts": t.hosts,
                "wrap": list(t.wrap),
                "devices_per_chip": chip.devices,
            },
            "mesh": {**self.mesh, "splits_a_torus_axis": self.split},
            "batch_size": self.batch,
            "memory": {
                **{
                    k: v
                    for k, v in dataclasses.asdict(self.memory).items()
                    if k not in ("buffers", "fits")
                },
                "headroom": self.memory.headroom,
                "per_chip": self.memory.total * chip.devices,
                "buffers": [dataclasses.asdict(b) for b in self.memory.buffers],
            },
            "flops": {
                "hardware": {**dataclasses.asdict(self.hardware), "total": self.hardware.total},
                "model": {**dataclasses.asdict(self.model), "total": self.model.total},
                "model_per_example": per_example,
                "analytic_per_example": self.analytic,
            },
            "attention_kernels": [dataclasses.asdict(k) for k in self.kernels],
            "collectives": [dataclasses.asdict(c) for c in self.traffic],
            "estimate": estimate,
            "hot": [dataclasses.asdict(h) for h in self.hot],
            "advice": [dataclasses.asdict(a) for a in self.advice],
            "warnings": list(self.warnings),
            "seconds": self.seconds,
            "versions": self.versions,
        }


def make_report(
    recipe: str,
    what: str,
    experiment: Experiment,
    topology: Topology,
    compiled: Compiled,
    batch: int,
    analytic: float | None,
) -> Report:
    """Read a compiled program.

    Args:
      batch: global number of rows. analytic: operations per row as the system states them.
    """
    program = compiled.program or compiled.early
    warnings: list[str] = []
    kernels: list[step_time.Kernel] = []
    traffic: tuple[Traffic, ...] = ()
    estimate: step_time.Estimate | None = None
    hot: list[step_time.Hot] = []
    if program is not None:
        executed, unknown = program.executed()
        found = collectives.find(program, executed, compiled.mesh, topology.chip, topology.slices)
        traffic = _summary(found)
        kernels = step_time.kernels(executed)
        if unknown:
            warnings.append(f"{unknown} loops have no constant length and are counted once")
        if any(not c.axes for c in found):
            warnings.append("some collectives have groups of a form that is not understood")
        if compiled.program is not None:
            needed = analytic * batch if analytic else compiled.model.total
            estimate, hot = step_time.estimate(
                program, executed, found, kernels, topology.chip, needed / topology.devices
            )
            if estimate.mfu[1] > step_time.IMPLAUSIBLE_MFU:
                warnings.append(
                    f"an MFU of {estimate.mfu[1]:.0%} is not plausible; do not rely on the time"
                )
    warnings += _remarks(experiment, topology, compiled, kernels, what)
    warnings += _crossing(traffic, estimate)
    sizes = {k: int(v) for k, v in compiled.mesh.shape.items()}
    return Report(
        recipe=recipe,
        what=what,
        topology=topology,
        mesh=sizes,
        split=compiled.split,
        batch=batch,
        memory=compiled.memory,
        hardware=compiled.hardware,
        model=compiled.model,
        analytic=analytic,
        kernels=tuple(kernels),
        traffic=traffic,
        estimate=estimate,
        hot=tuple(hot),
        advice=()
        if compiled.memory.fits
        else tuple(
            suggestions(experiment, topology, sizes, compiled.memory, train=what == "train")
        ),
        steps=experiment.steps if what == "train" else None,
        warnings=tuple(warnings),
        seconds=compiled.seconds,
        versions=versions(),
    )


def _remarks(
    experiment: Experiment,
    topology: Topology,
    compiled: Compiled,
    kernels: list[step_time.Kernel],
    what: str,
) -> list[str]:
    remarks = []
    if compiled.split:
        remarks.append(
            "a mesh axis takes part of a torus axis: its groups share links with others, and "
            "a mesh whose axes are whole torus axes communicates faster"
        )
    flash = [k for k in kernels if k.kind == "flash"]
    asked = getattr(getattr(experiment.system, "execution", experiment.system), "attention", "auto")
    if asked == "flash" and not flash and compiled.memory.fits:
        remarks.append("the recipe asks for the flash kernel, the program has none")
    if what == "train" and compiled.program is not None:
        leaves = compiled.state_leaves
        if compiled.program.aliased < leaves:
            remarks.append(
                f"{leaves - compiled.program.aliased} of {leaves} arrays of the state are copied "
                "instead of updated in place"
            )
    if topology.slices > 1:
        inside = compiled.mesh.shape["data"] // topology.slices
        remarks.append(
            f"{topology.slices} slices joined along the mesh axis data ({topology.slices} x "
            f"{inside} of them in a slice); memory, FLOPs and collectives are those of a device"
        )
    return remarks


def _crossing(traffic: tuple[Traffic, ...], estimate: step_time.Estimate | None) -> list[str]:
    """What goes over the network between slices, where it is much or repeated."""
    remarks = []
    for row in (r for r in traffic if r.dcn):
        share = f", {row.low / estimate.point:.0%} of the step" if estimate else ""
        remarks.append(
            f"{row.kind} between slices: {row.bytes / 2**20:,.1f} MiB per device and step over the "
            f"network, {row.low * 1e3:.1f} ms if alone{share}"
        )
        if row.in_loops:
            remarks.append(
                f"{row.kind} between slices runs {row.in_loops} times inside loops ({row.source}): "
                "fewer micro-batches, or a larger fsdp within a slice, send less"
            )
    return remarks


def _summary(found: list[collectives.Collective]) -> tuple[Traffic, ...]:
    grouped: dict[tuple[Any, ...], list[collectives.Collective]] = {}
    for c in found:
        key = (c.kind, c.axes, c.size, c.overlapped, c.dcn)
        grouped.setdefault(key, []).append(c)
    rows = [
        Traffic(
            kind=kind,
            axes="+".join(axes) or "?",
            size=size,
            places=len(items),
            runs=sum(c.times for c in items),
            in_loops=sum(c.times for c in items if c.in_loop),
            bytes=sum(c.payload * c.times for c in items),
            overlapped=overlapped,
            dcn=dcn,
            low=sum(c.low * c.times for c in items),
            high=sum(c.high * c.times for c in items),
            source=max(items, key=lambda c: c.payload * c.times).source,
        )
        for (kind, axes, size, overlapped, dcn), items in grouped.items()
    ]
    return tuple(sorted(rows, key=lambda r: -r.high))


def versions() -> dict[str, str]:
    """Versions that every figure depends on."""
    found = {}
    for name in ("jax", "jaxlib", "libtpu", "flax", "optax"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def table(report: Report) -> str:
    """For a person."""
    return "\n".join(
        line
        for part in (
            _head(report),
            _memory(report),
            _flops(report),
            _traffic(report),
            _estimate(report),
            _notes(report),
        )
        for line in (*part, "")
    ).rstrip()


def _head(r: Report) -> list[str]:
    t = r.topology
    mesh = " x ".join(f"{k} {v}" for k, v in r.mesh.items() if v > 1) or "one device"
    wrap = "rings" if all(t.wrap) else "lines" if not any(t.wrap) else "rings on the long axis"
    return [
        f"{r.recipe}, {r.what}: {'fits' if r.fits else 'DOES NOT FIT'}",
        f"  {t.name} ({t.product}): {t.chips} chips, {t.devices} devices, {t.hosts} hosts, {wrap}",
        f"  mesh {mesh}; batch {r.batch:,} ({r.batch / t.devices:g} per device)",
        "  "
        + ", ".join(f"{k} {v}" for k, v in r.versions.items())
        + "; "
        + ", ".join(f"{k} {v:.1f} s" for k, v in r.seconds.items()),
    ]


def _memory(r: Report) -> list[str]:
    m = r.memory
    unit, name_of_unit = (GIB, "GiB") if m.total >= GIB else (2**20, "MiB")

    def show(value: float) -> str:
        return f"{value / unit:10.3f}"

    rows = [
        ("parameters", m.parameters),
        ("optimiser state", m.optimizer),
        ("gradients", m.gradients),
        ("batch", m.batch),
        ("carried state, averages", m.other),
        ("padding of the above", m.argument_padding),
        ("activations, temporaries", m.temporaries),
        ("program", m.code),
    ]
    lines = [f"HBM per device, {name_of_unit}"]
    lines += [f"  {name:26}{show(value)}" for name, value in rows if value >= 2**10]
    lines.append(f"  {'total':26}{show(m.total)}  of {m.capacity / GIB:.2f} GiB usable")
    lines.append(f"  {'headroom':26}{show(m.headroom)}  ({m.headroom / m.capacity:.0%})")
    if r.topology.chip.devices > 1:
        lines.append(f"  {'total per chip':26}{show(m.total * r.topology.chip.devices)}")
    if m.buffers:
        lines.append("  largest temporaries" + ("" if r.fits else " (why it does not fit)"))
        notable = [b for b in m.buffers if b.bytes >= _NOTABLE_SHARE * m.total]
        for b in notable[: 5 if r.fits else 10]:
            lines.append(f"  {show(b.bytes)}  {b.array:32} {b.source}  {_short(b.origin)}")
        for b in m.buffers:
            large = b.bytes > _NOTABLE_BUFFER * m.capacity
            if large and b.bytes - b.logical > _NOTABLE_PADDING * b.bytes:
                lines.append(
                    f"  padding: {b.array} takes {b.bytes / b.logical:.2f} times its content; "
                    "make its two minor dimensions multiples of 8 x 128"
                )
    lines += [f"  try: {line}" for line in r.advice]
    return lines


def _short(origin: str) -> str:
    """The telling part of an `op_name`."""
    parts = [p for p in origin.split("/") if p not in ("closed_call", "body", "while")]
    return "/".join(parts[-4:])


def _flops(r: Report) -> list[str]:
    h, n = r.hardware, r.model
    lines = [
        "FLOPs per step, all devices (products only; loops counted as often as they run)",
        f"  as run       {h.total:.3e}   products {h.matmul:.3e}   attention {h.attention:.3e}",
        f"  as needed    {n.total:.3e}   products {n.matmul:.3e}   attention {n.attention:.3e}",
        f"  per example  {n.total / r.batch:.4e} counted"
        + (
            f", {r.analytic:.4e} stated by the system (ratio {n.total / r.batch / r.analytic:.3f})"
            if r.analytic
            else ""
        ),
    ]
    flash = [k for k in r.kernels if k.kind == "flash"]
    fused = [k for k in r.kernels if k.kind == "fused attention"]
    if flash:
        forward = sum(k.times for k in flash if not k.backward)
        backward = sum(k.times for k in flash if k.backward)
        lines.append(f"  attention: flash kernel, {forward} forward and {backward} backward calls")
    elif h.attention:
        lines.append("  attention: plain (no flash kernel in the program)")
    if fused:
        lines.append(
            f"  the compiler's own kernel for plain attention: {sum(k.times for k in fused)} calls"
        )
    return lines


def _traffic(r: Report) -> list[str]:
    if not r.traffic:
        return ["Collectives: none"]
    lines = [
        "Collectives per step (times are a model of the links, low to high)",
        f"  {'kind':20}{'mesh axes':16}{'of':>5}{'runs':>8}{'in loops':>9}{'MiB/device':>13}"
        f"{'ms':>21}  beside computation, source",
    ]
    for c in r.traffic:
        time = f"{c.low * 1e3:,.2f} - {c.high * 1e3:,.2f}"
        where = "between slices (DCN)" if c.dcn else "yes" if c.overlapped else "no"
        lines.append(
            f"  {c.kind:20}{c.axes:16}{c.size:>5}{c.runs:>8}{c.in_loops:>9}"
            f"{c.bytes / 2**20:>13,.1f}{time:>21}  {where}, {c.source}"
        )
    return lines


def _estimate(r: Report) -> list[str]:
    if r.estimate is None:
        return []
    e = r.estimate

    def span(pair: tuple[float, float]) -> str:
        return f"{pair[0] * 1e3:.1f} - {pair[1] * 1e3:.1f}"

    lines = [
        "Step time, ESTIMATED (docs/preflight.md says from what)",
        f"  products {e.products * 1e3:.1f} ms, elementwise {span(e.elementwise)} ms, attention "
        f"kernels {span(e.kernels)} ms",
        f"  collectives: blocking {span(e.blocking)} ms, overlapped {span(e.overlapped)} ms",
        f"  step {e.point * 1e3:.1f} ms ({e.low * 1e3:.1f} to {e.high * 1e3:.1f})",
        f"  MFU {e.mfu[1]:.0%} ({e.mfu[0]:.0%} to {e.mfu[2]:.0%})",
        f"  examples/s {r.batch / e.point:,.0f} ({r.batch / e.high:,.0f} to "
        f"{r.batch / e.low:,.0f})",
        *(
            [
                f"  {r.steps:,} steps {_hours(r.steps * e.point)} "
                f"({_hours(r.steps * e.low)} to {_hours(r.steps * e.high)})"
            ]
            if r.steps
            else []
        ),
        "  most of the compute time (estimated cycles)",
    ]
    for h in r.hot[:5]:
        kind = "product" if h.product else "elementwise"
        lines.append(
            f"  {h.seconds * 1e3:9.2f} ms  {h.times:>5} x {kind:12} {h.source}  {_short(h.origin)}"
        )
    return lines


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 360 else f"{seconds / 60:.1f} min"


def _notes(r: Report) -> list[str]:
    return [f"note: {line}" for line in r.warnings]


def compare(reports: list[Report], *, title: str) -> str:
    """Several meshes side by side, in the order given."""
    lines = [
        title,
        f"  {'mesh':34}{'fits':6}{'HBM GiB':>9}{'headroom':>10}{'ms':>9}{'range':>18}"
        f"{'MFU':>6}{'examples/s':>12}{'comm. ms':>10}",
    ]
    for r in reports:
        mesh = " ".join(f"{k}={v}" for k, v in r.mesh.items() if v > 1) or "one device"
        mesh += " *" if r.split else ""
        m, e = r.memory, r.estimate
        row = f"  {mesh:34}{'yes' if r.fits else 'NO':6}{m.total / GIB:9.2f}"
        row += f"{m.headroom / m.capacity:>9.0%} "
        if e is not None:
            communication = e.blocking[0] + e.overlapped[0]
            row += (
                f"{e.point * 1e3:>9.1f}{f'{e.low * 1e3:.1f}-{e.high * 1e3:.1f}':>18}"
                f"{e.mfu[1]:>6.0%}{r.batch / e.point:>12,.0f}{communication * 1e3:>10.1f}"
            )
        lines.append(row)
    if any(r.split for r in reports):
        lines.append("  * a mesh axis takes part of a torus axis")
    lines.append("  times are estimates; their order is more reliable than their size")
    return "\n".join(lines)
