"""What the commands of `jaxmods` do, once the command line is understood."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_pipelines.protocols.base import EvalResult
from jaxmods.partitioning import make_mesh
from jaxmods.system import Params
from train import recipes
from train.canonical import canonical, differences, recipe_hash, show
from train.checkpoint import is_params_folder, load_params, load_run_params, read_facts
from train.describe import describe, render, table
from train.exits import ExitCode, UsageError, UserError
from train.recipes import RECIPE_FILE, Recipe, read_document
from train.results import plain
from train.state import Plan, make_plan

LOG = logging.getLogger("train")


def _print_json(value: Any) -> None:
    print(json.dumps(plain(value), indent=1, ensure_ascii=False))


def list_recipes(*, as_json: bool) -> int:
    """Every recipe with the first line of its docstring."""
    found = {name: recipes.summary(function) for name, function in recipes.all_recipes().items()}
    if as_json:
        _print_json([{"recipe": k, "summary": v} for k, v in found.items()])
    else:
        print("\n".join(table(("recipe", "what it is"), found.items())))
    return ExitCode.OK


def describe_recipe(name: str, settings: Sequence[str], *, as_json: bool) -> int:
    """Parameters, optimiser, batch and memory."""
    facts = describe(recipes.resolve(name, settings))
    if as_json:
        _print_json(facts)
    else:
        print(render(facts))
    return ExitCode.OK


def fit_recipe(
    name: str,
    settings: Sequence[str],
    workdir: str,
    *,
    allow_change: Sequence[str],
    report: bool,
    as_json: bool,
) -> int:
    """Train; then write the report. Process 0 of several speaks for all."""
    from train.loop import fit
    from train.peers import leads

    recipe = recipes.resolve(name, settings)
    result = fit(
        recipe.experiment,
        workdir,
        name=recipe.name,
        overrides=recipe.overrides,
        allow_change=allow_change,
    )
    if result.status == "preempted":
        return ExitCode.PREEMPTED
    if not leads():
        return ExitCode.OK
    page = _try_report(result.workdir) if report else None
    if as_json:
        summary = json.loads((result.workdir / "summary.json").read_text(encoding="utf-8"))
        _print_json({**summary, "workdir": str(result.workdir), "report": page})
    else:
        _print_results(result.results)
        print(f"run folder: {result.workdir}")
        if page is not None:
            print(f"report: {page}")
    return ExitCode.OK


def evaluate_run(
    name: str,
    settings: Sequence[str],
    workdir: str,
    *,
    protocols: Sequence[str],
    out: str | None,
    as_json: bool,
) -> int:
    """Run protocols on the newest checkpoint of a run, or on a folder of parameters. Process 0 of
    several speaks for all."""
    from train.agreement import check
    from train.evaluate import Evaluator, check_protocols, run_protocols
    from train.peers import current, leads
    from train.runtime import use_compilation_cache

    recipe, plan = _recipe_and_plan(name, settings)
    chosen = recipe.experiment.evaluation.protocols
    if protocols:
        known = {p.name: p for p in chosen}
        unknown = [p for p in protocols if p not in known]
        if unknown:
            raise UsageError(
                f"--protocol {' '.join(unknown)}: this recipe has {', '.join(known) or 'none'}"
            )
        chosen = tuple(known[p] for p in protocols)
    if not chosen:
        raise UserError(f"recipe {name} has no evaluation.protocols")
    use_compilation_cache()
    if (peers := current()) is not None:
        for line in check(peers, recipe):
            LOG.info("%s", line)
    evaluator = Evaluator(plan)
    check_protocols(chosen, evaluator.names)
    params, step = _params_of(Path(workdir), recipe, plan)
    folder = Path(out or workdir)
    results = run_protocols(
        evaluator, params, chosen, folder=folder if leads() else None, step=step, panels=True
    )
    if not leads():
        return ExitCode.OK
    page = _try_report(folder) if (folder / RECIPE_FILE).exists() else None
    if as_json:
        from train.results import to_json

        _print_json(
            {
                "recipe": recipe.name,
                "step": step,
                "results": [to_json(r) for r in results.values()],
                "report": page,
            }
        )
    else:
        _print_results(results)
        print(f"results: {folder / 'eval' / f'{step}.json'}")
    return ExitCode.OK


def report_run(workdir: str, *, as_json: bool) -> int:
    """Write `report.html`."""
    from train.report import write_report

    if not (Path(workdir) / RECIPE_FILE).exists():
        raise UserError(f"{workdir}: expected a run folder with {RECIPE_FILE}, found none")
    page = write_report(Path(workdir))
    _print_json({"report": page}) if as_json else print(page)
    return ExitCode.OK


def import_folder(
    name: str,
    settings: Sequence[str],
    source: str,
    target: str | None,
    *,
    overwrite: bool,
    as_json: bool,
) -> int:
    """PyTorch weights to a folder of parameters; without `target` only the key report."""
    from train import interchange

    recipe = recipes.resolve(name, settings)
    system = recipe.experiment.system
    if target is None:
        report = interchange.dry_run(system, source)
        _print_json(report) if as_json else print(report)
        return ExitCode.OK
    facts = {"recipe": recipe.name, "recipe_hash": _hash(recipe), "step": 0}
    with _progress("reading") as progress:
        params = interchange.import_to_folder(
            system, source, target, facts=facts, overwrite=overwrite, progress=progress
        )
    facts = {**facts, "parameters": _count(params), "folder": str(target)}
    if as_json:
        _print_json(facts)
    else:
        print(
            f"{facts['parameters']:,} parameters in {target}\n"
            f"next: jaxmods eval {name} --workdir {target}\n"
            f"      jaxmods fit {name} --workdir RUN --set init.weights={target}"
        )
    return ExitCode.OK


def export_folder(
    name: str,
    settings: Sequence[str],
    source: str,
    target: str,
    *,
    verify: bool,
    dtype: str | None,
    overwrite: bool,
    as_json: bool,
) -> int:
    """A run or a folder of parameters to a PyTorch folder."""
    from train import interchange

    recipe, plan = _recipe_and_plan(name, settings)
    params, step = _params_of(Path(source), recipe, plan)
    system = recipe.experiment.system
    with _progress("writing") as progress:
        interchange.export_weights(
            system,
            params,
            target,
            assets=_assets(recipe, Path(source)),
            dtype=dtype,
            overwrite=overwrite,
            progress=progress,
        )
    facts: dict[str, Any] = {"recipe": recipe.name, "step": step, "folder": str(target)}
    passed = True
    if verify:
        certificate = interchange.verify(system, params, target, dtype=dtype)
        facts["verify"], passed = certificate, certificate.passed
    if as_json:
        _print_json(facts)
    else:
        print(f"exported step {step} to {target}")
        if verify:
            print(
                f"verified: {'passed' if passed else 'FAILED'}; "
                f"re-read {'bit-equal' if certificate.bit_equal else 'NOT equal'}; "
                f"forward pass {certificate.forward}"
            )
            for output, error in certificate.relative_errors.items():
                print(f"  {output}: relative error {error:.2e}")
    return ExitCode.OK if passed else ExitCode.ERROR


def inspect_data(
    name: str, settings: Sequence[str], out: str, samples: int, *, as_json: bool
) -> int:
    """Draw samples of a recipe's data and count."""
    from data_pipelines.inspect import inspect_pipeline

    recipe = recipes.resolve(name, settings)
    found = inspect_pipeline(recipe.experiment.data, Path(out), samples=samples)
    if as_json:
        _print_json(found)
    else:
        for key, value in plain(found).items():
            print(f"{key}: {value if isinstance(value, str) else json.dumps(value)}")
    return ExitCode.OK


# What several commands share.


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar of bytes on a terminal; None (nothing to call) elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(desc=what, unit="B", unit_scale=True, file=sys.stderr) as bar:

        def show_bytes(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show_bytes


def _recipe_and_plan(name: str, settings: Sequence[str]) -> tuple[Recipe, Plan]:
    recipe = recipes.resolve(name, settings)
    try:
        mesh = make_mesh(recipe.experiment.mesh)
    except ValueError as error:
        raise UserError(str(error)) from error
    return recipe, make_plan(recipe.experiment, mesh)


def _params_of(folder: Path, recipe: Recipe, plan: Plan) -> tuple[Params, int]:
    """Parameters of a run (its newest checkpoint) or of a folder of parameters, and their step.

    Raises:
      UserError: neither is there, or the run is of another system.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a run or a folder of parameters")
    if is_params_folder(folder):
        target = plan.abstract_sharded().params
        return load_params(folder, target), int(read_facts(folder).get("step", 0))
    saved = folder / RECIPE_FILE
    if not saved.exists():
        raise UserError(
            f"{folder}: expected a run folder ({RECIPE_FILE}) or a folder of parameters, "
            "found neither"
        )
    old = read_document(saved)["experiment"]["system"]
    found = differences({"system": old}, {"system": canonical(recipe.experiment.system)})
    if found:
        listing = "\n".join(f"  {p}: {show(a)} → {show(b)}" for p, (a, b) in found.items())
        raise UserError(
            f"{folder} holds a run of another system than {recipe.name}:\n{listing}\n"
            "Name the recipe (and --set) that it was trained with, see recipe.json"
        )
    return load_run_params(folder, plan)


def _assets(recipe: Recipe, source: Path) -> dict[str, Path | bytes]:
    """Tokenizer and processor files: those of an imported folder, else the pipeline's own."""
    from train.interchange import ASSETS, hub_assets

    assets: dict[str, Path | bytes] = dict(recipe.experiment.data.assets())
    weights = recipe.experiment.init.weights
    for folder in filter(None, (Path(weights).expanduser() if weights else None, source)):
        for place in (folder, folder / ASSETS):
            if place.is_dir():
                assets.update(hub_assets(place))
    return assets


def _hash(recipe: Recipe) -> str:
    return recipe_hash(canonical(recipe.experiment))


def _count(params: Params) -> int:
    import jax

    return sum(int(x.size) for x in jax.tree.leaves(params))


def _try_report(workdir: Path) -> Path | None:
    """The report; a report that fails does not make a finished run a failure."""
    try:
        from train.report import write_report

        return write_report(workdir)
    except Exception:  # anything: the run itself is done and saved
        LOG.exception("the report could not be written; jaxmods report %s tries again", workdir)
        return None


def _print_results(results: dict[str, EvalResult]) -> None:
    rows = [
        (
            protocol,
            metric,
            f"{value.value:.4g}",
            "" if value.chance is None else f"{value.chance:.4g}",
            "" if value.published is None else f"{value.published:.4g}",
        )
        for protocol, result in results.items()
        for metric, value in result.metrics.items()
    ]
    if rows:
        print("\n".join(table(("protocol", "metric", "value", "chance", "published"), rows)))
