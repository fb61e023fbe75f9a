"""`jaxmods preflight`: what a recipe needs on a TPU topology, found out without one."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from train.exits import ExitCode, UsageError, UserError
from train.preflight import topologies

if TYPE_CHECKING:
    from jaxmods.system import ArraySpec
    from train.experiment import Experiment
    from train.preflight.report import Report
    from train.preflight.topologies import Topology

LOG = logging.getLogger("train")

_AXES = ("data", "fsdp", "tensor", "context")
_EXAMPLE = """examples:
  jaxmods preflight fgclip/base_stage1 --topology v5e-256
  jaxmods preflight fgclip/large_stage1 --topology v5p:4x4x4 --set batch_size=131072
  jaxmods preflight fgclip/large_stage1 --topology v5e-64 --suggest
  jaxmods preflight fgclip/base_stage1 --topology v5e-256 --compare data=256 fsdp=16
  jaxmods preflight fgclip/base_stage1 --topology v5e-256 --sweep fsdp=1,16,256 tensor=1,4
  jaxmods preflight iaa/iaa_14 --topology v5e-64 --what decode_mm,prefill_mm

exit codes:
  0 fits   1 error   2 wrong usage   12 does not fit into memory"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command `preflight` to `argparse` sub-commands."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "preflight",
        help="compile a recipe for a TPU topology without a TPU: memory, FLOPs, traffic, time",
        description="Compile a recipe for a TPU topology without a TPU: does it fit, what does it "
        "communicate, how long might a step take.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument(
        "recipe", metavar="RECIPE", help="system/recipe, or file.py:function for your own"
    )
    parser.add_argument(
        "--topology",
        required=True,
        metavar="NAME",
        help="v5e:16x16, or the product's name: v5e-256, v5p-128, v6e-64, tpu7x-128",
    )
    parser.add_argument(
        "--slices", type=int, default=1, metavar="N", help="equal slices over DCN (default: 1)"
    )
    parser.add_argument(
        "--what",
        default="train",
        metavar="WHAT",
        help="train (default): the training step; eval: the named functions that evaluations call; "
        "sample: those that generate; or names of functions, as decode_mm,prefill_mm",
    )
    parser.add_argument(
        "--suggest",
        action="store_true",
        help="when it does not fit, compile with the suggested settings, one more at a time, until "
        "it does",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        dest="settings",
        metavar="PATH=VALUE",
        help="override values of the recipe by dotted path",
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="two meshes side by side, each as fsdp=16,tensor=4; data takes the rest",
    )
    group.add_argument(
        "--sweep",
        nargs="*",
        metavar="AXIS=SIZES",
        help="all meshes of these sizes, ranked, as fsdp=1,16,256 tensor=1,4; data takes the rest",
    )
    return parser


def run(options: argparse.Namespace) -> int:
    """Run the command. Returns 0 when (any of) the programs fit, 12 when not."""
    topology = topologies.parse(options.topology, options.slices)
    topologies.require_libtpu()
    topologies.settle_environment()

    from train.preflight.report import compare, table
    from train.recipes import resolve

    experiment = resolve(options.recipe, options.settings).experiment
    devices = topologies.devices(topology)
    if options.compare is None and options.sweep is None:
        reports = reports_for(options.recipe, options.what, experiment, topology, devices)
        fitting: Fitting | None = None
        if options.suggest and not all(r.fits for r in reports):
            fitting = first_that_fits(
                options.recipe, options.what, experiment, topology, devices, reports
            )
        if options.json:
            found = [r.json() for r in reports]
            if fitting is not None:
                found[0]["suggested"] = {
                    "settings": list(fitting.settings),
                    "reports": [r.json() for r in fitting.reports],
                }
            print(json.dumps(found[0] if options.what == "train" else found, indent=2))
        else:
            print("\n\n".join(table(r) for r in reports))
            if fitting is not None:
                print(f"\n\nWith --set {' '.join(fitting.settings)}\n")
                print("\n\n".join(table(r) for r in fitting.reports))
            elif options.suggest and not all(r.fits for r in reports):
                print("\nnone of the suggested settings fits")
        return ExitCode.OK if all(r.fits for r in reports) else ExitCode.OUT_OF_MEMORY

    if options.what != "train":
        raise UsageError(
            "--compare and --sweep: expected --what train; evaluate one mesh at a time"
        )
    if options.suggest:
        raise UsageError("--suggest: expected one mesh, without --compare and --sweep")
    if options.compare is not None:
        meshes = [mesh_sizes(text, topology) for text in options.compare]
    else:
        meshes = list(sweep_sizes(options.sweep, topology))
    reports, skipped = [], {}
    for i, sizes in enumerate(meshes):
        name = " ".join(f"{k}={v}" for k, v in sizes.items())
        LOG.info("%d of %d: %s", i + 1, len(meshes), name)
        changed = dataclasses.replace(
            experiment, mesh=dataclasses.replace(experiment.mesh, **sizes)
        )
        try:
            reports += reports_for(options.recipe, "train", changed, topology, devices)
        except UserError as error:
            skipped[name] = str(error)
    if options.sweep is not None:
        reports.sort(key=_rank)
    if options.json:
        print(json.dumps({"meshes": [r.json() for r in reports], "skipped": skipped}, indent=2))
    else:
        title = f"{options.recipe} on {topology.name}, batch {experiment.batch_size:,}"
        print(compare(reports, title=title))
        for name, reason in skipped.items():
            print(f"  {name}: skipped, {reason}", file=sys.stderr)
    if not reports:
        raise UserError("preflight: no mesh could be compiled: " + "; ".join(skipped.values()))
    return ExitCode.OK if any(r.fits for r in reports) else ExitCode.OUT_OF_MEMORY


def _rank(report: Report) -> tuple[bool, float]:
    return not report.fits, report.estimate.point if report.estimate else report.memory.total


def reports_for(
    recipe: str, what: str, experiment: Experiment, topology: Topology, devices: list[Any]
) -> list[Report]:
    """Reports of one mesh: of the training step, or one per named function.

    Raises:
      UserError: a recipe that does not suit the topology, or has nothing to compile.
    """
    from train.metrics import announced
    from train.preflight import program
    from train.preflight.report import make_report

    if what == "train":
        with announced(f"compiling {recipe} for {topology.name}"):
            compiled = program.train_step(experiment, topology, devices)
        analytic = experiment.system.flops_per_example()
        size = experiment.batch_size
        return [make_report(recipe, "train", experiment, topology, compiled, size, analytic)]
    rows = experiment.evaluation.batch_size
    reports = []
    for name, arguments in functions_for(what, experiment).items():
        with announced(f"compiling {recipe}, {name}, for {topology.name}"):
            compiled = program.inference(experiment, topology, devices, name, arguments)
        reports.append(make_report(recipe, name, experiment, topology, compiled, rows, None))
    return reports


def functions_for(what: str, experiment: Experiment) -> dict[str, dict[str, ArraySpec]]:
    """Arguments, by function, of the named functions that `what` stands for: "sample" those called
    `sample` or `sample_...`, "eval" all others, anything else the functions of these names,
    separated by commas.

    Raises:
      UserError: the system lists none of them.
      UsageError: a name that it does not list.
    """
    system = experiment.system
    inputs = system.function_inputs(experiment.evaluation.batch_size)
    known = f"it lists {', '.join(inputs)}" if inputs else "it lists no function"
    if what not in ("eval", "sample"):
        names = what.split(",")
        if unknown := [name for name in names if name not in inputs]:
            raise UsageError(
                f"preflight --what {what}: expected train, eval, sample, or functions of "
                f"{type(system).__name__}, found {', '.join(unknown)}; {known}"
            )
        return {name: inputs[name] for name in names}
    found = {n: a for n, a in inputs.items() if (n.split("_")[0] == "sample") == (what == "sample")}
    if not found:
        raise UserError(
            f"preflight --what {what}: expected {type(system).__name__}.function_inputs to list "
            + ("a function called sample" if what == "sample" else "the functions of evaluations")
            + f"; {known}"
        )
    return found


@dataclasses.dataclass(frozen=True)
class Fitting:
    """Settings with which a recipe fits, and the reports that show it."""

    settings: tuple[str, ...]
    reports: list[Report]


def first_that_fits(
    recipe: str,
    what: str,
    experiment: Experiment,
    topology: Topology,
    devices: list[Any],
    reports: list[Report],
) -> Fitting | None:
    """Compile with the first suggestion of a report that does not fit, then with the first two,
    and so on; None when all of them together are not enough."""
    from train.overrides import apply_overrides

    advice = next(r.advice for r in reports if not r.fits)
    settings: tuple[str, ...] = ()
    for suggestion in (a for a in advice if a.settings):
        settings += suggestion.settings
        LOG.info("trying --set %s", " ".join(settings))
        try:
            changed = apply_overrides(experiment, settings)
            found = reports_for(recipe, what, changed, topology, devices)
        except UserError as error:
            LOG.info("%s", error)
            continue
        if all(r.fits for r in found):
            return Fitting(settings, found)
    return None


def mesh_sizes(text: str, topology: Topology) -> dict[str, int]:
    """Sizes of all mesh axes from `fsdp=16,tensor=4`; "data" takes what is left.

    Raises:
      UsageError: a malformed text, or sizes that do not divide the devices.
    """
    sizes = dict.fromkeys(_AXES, 1)
    given = {}
    for part in text.split(","):
        axis, sign, size = part.partition("=")
        if not sign or axis not in _AXES or not size.isdigit() or int(size) < 1:
            raise UsageError(
                f"--compare: expected axis=size pairs as fsdp=16,tensor=4, found {text!r}; "
                f"axes: {', '.join(_AXES)}"
            )
        given[axis] = int(size)
    sizes.update(given)
    if "data" not in given:
        known = sizes["fsdp"] * sizes["tensor"] * sizes["context"]
        if topology.devices % known:
            raise UsageError(
                f"--compare: {text} does not divide the {topology.devices} devices of "
                f"{topology.name}"
            )
        sizes["data"] = topology.devices // known
    return sizes


def sweep_sizes(choices: Sequence[str], topology: Topology) -> Iterator[dict[str, int]]:
    """Meshes of a sweep: all combinations that divide the devices and leave whole slices.

    Args:
      choices: `axis=size,size`; axes left out keep 1, without any: fsdp and tensor in steps.
    """
    per_slice = topology.devices // topology.slices
    options: dict[str, list[int]] = {}
    for text in choices:
        axis, sign, sizes = text.partition("=")
        parts = sizes.split(",")
        if not sign or axis not in _AXES[1:] or not all(p.isdigit() and int(p) for p in parts):
            raise UsageError(
                f"--sweep: expected axis=sizes as fsdp=1,16,256, found {text!r}; "
                f"axes: {', '.join(_AXES[1:])} (data takes the rest)"
            )
        options[axis] = [int(p) for p in parts]
    if not options:
        side = max(topology.shape)
        options = {"fsdp": sorted({1, side, per_slice}), "tensor": [1, 4]}
    found = False
    for combination in itertools.product(*options.values()):
        mesh = dict.fromkeys(_AXES, 1) | dict(zip(options, combination, strict=True))
        known = mesh["fsdp"] * mesh["tensor"] * mesh["context"]
        if per_slice % known == 0:
            found = True
            yield mesh | {"data": topology.devices // known}
    if not found:
        raise UsageError(f"--sweep: none of the sizes divides the {per_slice} devices of a slice")
