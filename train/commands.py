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
from data_pipelines.samplers.outputs import Format
from jaxmods.nn.lora import Dialect
from jaxmods.partitioning import make_mesh
from jaxmods.system import FROZEN, Params
from train import recipes
from train.canonical import canonical, differences, recipe_hash, show
from train.checkpoint import is_params_folder, load_params, load_run_params, read_facts
from train.describe import describe, render, table
from train.exits import ExitCode, UsageError, UserError
from train.recipes import RECIPE_FILE, Recipe, read_document
from train.results import plain
from train.sample import Given, Origin
from train.state import Plan, flatten, make_plan, merge
from train.workdir import is_allowed

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


def sample_recipe(
    name: str,
    settings: Sequence[str],
    origin: Origin,
    given: Given,
    out: str | None,
    *,
    batch: int | None,
    kind: Format,
    sheet: int,
    chat: bool,
    overwrite: bool,
    as_json: bool,
) -> int:
    """Make something with a model: of own files or texts, of a batch file, or of the recipe's
    evaluation data. Process 0 of several speaks for all."""
    from train import sample
    from train.peers import current, leads
    from train.runtime import code_version, use_compilation_cache

    recipe, plan = _recipe_and_plan(name, settings)
    experiment = recipe.experiment
    offered = experiment.system.functions()
    sampler = sample.check_sampler(experiment.sampler, offered, recipe.name)
    if not chat:
        requests, total = given.requests(sampler)
        if out is None:
            raise UsageError("sample: expected --out DIR, or --chat to talk")
        if leads():
            sample.check_folder(Path(out), overwrite=overwrite)
    use_compilation_cache()
    if (peers := current()) is not None:
        from train.agreement import check

        for line in check(peers, recipe):
            LOG.info("%s", line)
    params, weights = _params_from(origin, recipe, plan)
    runner = sample.Runner(plan, params)
    if chat:
        from train.chat import chat as talk

        return talk(sampler, runner.functions(), given)
    about = {
        "recipe": recipe.name,
        "overrides": list(recipe.overrides),
        "recipe_hash": _hash(recipe),
        "weights": weights,
        "code": code_version(),
    }
    output = sample.Output(
        Path(out or "") if leads() else None,
        {**about, "system": canonical(experiment.system)},
        kind,
        sheet,
    )
    rows = batch or sample.default_rows(plan, total)
    outcome = sample.sample(runner, sampler, requests, output, rows=rows, total=total)
    if not leads():
        return ExitCode.OK
    facts = sample.write_facts(Path(out or ""), outcome, {**about, "batch": rows})
    if as_json:
        _print_json({**facts, "folder": str(out)})
    else:
        print(
            f"{outcome.made} examples in {out} ({facts['seconds_per_example']:.3g} s each after "
            f"compilation); {len(outcome.failed)} could not be used"
        )
    return ExitCode.ERROR if outcome.failed else ExitCode.OK


def encode_recipe(
    name: str,
    settings: Sequence[str],
    origin: Origin,
    out: str,
    *,
    batch: int,
    limit: int | None,
    as_json: bool,
) -> int:
    """The recipe's data through the system's encoders, once; goes on where it was cut off."""
    from train import encode, sample
    from train.runtime import code_version, use_compilation_cache

    if batch < 1 or (limit is not None and limit < 1):
        raise UsageError("encode: expected --batch and --limit from 1")
    recipe, plan = _recipe_and_plan(name, settings)
    data = encode.encodable(recipe.experiment.data, recipe.experiment.system, recipe.name)
    use_compilation_cache()
    params, _ = _params_from(origin, recipe, plan)
    digest = encode.encoder_digest(plan, params, tuple(data.lists().values()))
    facts = {
        "recipe": recipe.name,
        "encoder_digest": digest,
        "compute": recipe.experiment.precision.compute,
        "code": code_version(),
    }
    runner = sample.Runner(plan, params)
    done = encode.encode(runner, data, Path(out), facts, rows=batch, limit=limit)
    if as_json:
        _print_json({**facts, "folders": done.folders, "left_out": done.left_out})
    else:
        for folder, count in done.folders.items():
            print(f"{count} encoded examples in {folder}")
        print(f"left out: {json.dumps(done.left_out)}; encoder {digest}")
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
    adapters: str | None,
    overwrite: bool,
    as_json: bool,
) -> int:
    """PyTorch weights, and adapters for them, to a folder of parameters; without `target` only the
    key report."""
    from train import interchange
    from train.adapters import look_at

    recipe = recipes.resolve(name, settings)
    system = recipe.experiment.system
    if target is None:
        report = interchange.dry_run(system, source)
        about = None if adapters is None else look_at(system, adapters)
        if as_json:
            _print_json(report if about is None else {"weights": report, "adapters": about})
        else:
            print("\n".join(str(part) for part in (report, about) if part is not None))
        return ExitCode.OK
    facts = {"recipe": recipe.name, "recipe_hash": _hash(recipe), "step": 0}
    with _progress("reading") as progress:
        params = interchange.import_to_folder(
            system,
            source,
            target,
            facts=facts,
            adapters=adapters,
            overwrite=overwrite,
            progress=progress,
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
    adapters: Dialect | None,
    merged: bool,
    verify: bool,
    dtype: str | None,
    overwrite: bool,
    as_json: bool,
) -> int:
    """A run or a folder of parameters to a PyTorch folder: as it is, with its adapters merged, or
    its adapters alone."""
    from train import interchange
    from train.adapters import adapter_map, merge_adapters, verify_adapters, write_adapters

    recipe, plan = _recipe_and_plan(name, settings)
    system, certificate = recipe.experiment.system, None
    if merged:
        adapter_map(system)  # refused before anything large is read
    facts: dict[str, Any] = {"recipe": recipe.name, "folder": str(target)}
    if adapters is not None:
        params, facts["step"] = _adapters_of(Path(source), recipe, plan)
        ranks = write_adapters(
            system, params, target, dialect=adapters, dtype=dtype, overwrite=overwrite
        )
        facts["adapters"] = {"format": adapters, "modules": len(ranks)}
        if verify:
            certificate = verify_adapters(system, params, target, dtype=dtype)
    else:
        params, facts["step"] = _params_of(Path(source), recipe, plan)
        if merged:
            system, params = merge_adapters(system, params, dtype=dtype)
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
        if verify:
            certificate = interchange.verify(system, params, target, dtype=dtype)
    if certificate is not None:
        facts["verify"] = certificate
    if as_json:
        _print_json(facts)
    else:
        what = f"adapters of {len(ranks)} modules of " if adapters is not None else ""
        print(f"exported {what}step {facts['step']} to {target}{', merged' if merged else ''}")
        if certificate is not None:
            print(
                f"verified: {'passed' if certificate.passed else 'FAILED'}; "
                f"re-read {'bit-equal' if certificate.bit_equal else 'NOT equal'}; "
                f"forward pass {certificate.forward}"
            )
            for output, error in certificate.relative_errors.items():
                print(f"  {output}: relative error {error:.2e}")
    return ExitCode.OK if certificate is None or certificate.passed else ExitCode.ERROR


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


def _adapters_of(folder: Path, recipe: Recipe, plan: Plan) -> tuple[Params, int]:
    """Parameters of which only the adapters are sure to be read, the others may be abstract."""
    from train.adapters import adapter_map

    labels = plan.labels[adapter_map(recipe.experiment.system).under]
    frozen = FROZEN in set(flatten(labels).values())
    params, step = _params_of(folder, recipe, plan, frozen=frozen)
    return merge(plan.abstract.params, params), step


def _params_from(origin: Origin, recipe: Recipe, plan: Plan) -> tuple[Params, dict[str, Any]]:
    """Parameters to sample with, and where they come from."""
    from train.adapters import read_adapters
    from train.interchange import read_params

    system = recipe.experiment.system
    if origin.workdir is not None:
        folder = Path(origin.workdir)
        params, step = _params_of(folder, recipe, plan, free=system.sampling_fields)
        said: dict[str, Any] = {"from": origin.workdir, "step": step}
    else:
        weights = origin.weights or recipe.experiment.init.weights
        if weights is None:
            raise UsageError(
                "sample: expected --workdir RUN or --weights FOLDER, found neither, and the recipe "
                "names no init.weights"
            )
        target = plan.abstract_sharded().params
        params = read_params(system, Path(weights).expanduser(), like=target)
        said = {"from": weights}
    if origin.adapters is not None:
        params, _ = read_adapters(system, params, origin.adapters)
        said["adapters"] = origin.adapters
    return params, said


def _params_of(
    folder: Path,
    recipe: Recipe,
    plan: Plan,
    *,
    frozen: bool = True,
    free: Sequence[str] = (),
) -> tuple[Params, int]:
    """Parameters of a run (its newest checkpoint) or of a folder of parameters, and their step.
    Without `frozen` a run's frozen parameters are left out. Fields of the system that are `free`
    may differ from those of the run.

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
    places = tuple(f"system.{field}" for field in free)
    allowed = [p for p in found if is_allowed(p, places)]
    for path in allowed:
        before, after = found.pop(path)
        LOG.info("other than in the run: %s: %s → %s", path, show(before), show(after))
    if found:
        listing = "\n".join(f"  {p}: {show(a)} → {show(b)}" for p, (a, b) in found.items())
        raise UserError(
            f"{folder} holds a run of another system than {recipe.name}:\n{listing}\n"
            "Name the recipe (and --set) that it was trained with, see recipe.json"
        )
    return load_run_params(folder, plan, frozen=frozen)


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
