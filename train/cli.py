"""The command `jaxmods`: what it takes, what it prints, what it ends with.

Nothing heavy is imported before a command runs, so that `--help` answers at once. Results go to
standard output, everything else to standard error. Exit codes are those of `train.exits`.
"""

from __future__ import annotations

import argparse
import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from train import distributed
from train.exits import ExitCode, UsageError, classify
from train.preflight import command as preflight
from train.runtime import settle_platform

LOG = logging.getLogger("train")

_CODES = """exit codes:
  0 done   1 error   2 wrong usage   10 stopped by a signal and saved (run again to continue)
  11 host lost   12 out of memory   13 loss not finite   14 data cannot be used"""

_MEMORY = """jaxmods: out of memory. What helps (a saved run also needs --allow-change):
  --set precision.compute=bfloat16        activations take half
  --set batch_size=...                    activations shrink with it
  --set mesh.fsdp=N                       parameters and optimiser split over N devices
  --set precision.frozen=bfloat16         frozen parameters take half
jaxmods describe RECIPE shows what parameters, gradients and optimiser take per device."""

_NAMES = "system/recipe (see jaxmods list), or file.py:function for your own"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if not hasattr(options, "run"):
        parser.print_help()
        return ExitCode.USAGE
    return run(options)


def run(options: argparse.Namespace) -> int:
    """Run the command `options.run`. Returns the exit code; a job of several processes that failed
    does not return."""
    _log_to_stderr()
    warning = settle_platform()
    if warning:
        LOG.warning(warning)
    code = _run(options)
    if distributed.started():  # it failed, and so do the others
        distributed.leave_at_once(code)
    return code


def _run(options: argparse.Namespace) -> int:
    """The command's exit code; whatever it raises is said."""
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        print("jaxmods: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return ExitCode.OK  # the reader of a pipe has seen enough
    except Exception as error:
        code = classify(error)
        if options.debug or not _expected(error):
            traceback.print_exc()
        print(f"jaxmods: {_message(error)}", file=sys.stderr)
        if code == ExitCode.OUT_OF_MEMORY:
            print(_MEMORY, file=sys.stderr)
        return int(code)


def _expected(error: Exception) -> bool:
    """Whether one message is enough: everything but what can only be a fault of the program."""
    if classify(error) != ExitCode.ERROR:
        return True
    from train.exits import UserError

    return isinstance(error, (UserError, ValueError, OSError))


def _message(error: Exception) -> str:
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"no such file or folder: {error.filename}"
    return str(error) or type(error).__name__


class _Handler(logging.StreamHandler[Any]):
    """Log lines to standard error, above a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        if "tqdm" in sys.modules:
            from tqdm import tqdm

            with tqdm.external_write_mode(file=sys.stderr):
                super().emit(record)
        else:
            super().emit(record)


def _log_to_stderr() -> None:
    handler = _Handler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    LOG.handlers[:] = [handler]
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
    logging.getLogger("absl").setLevel(logging.ERROR)  # the checkpoint library's own diary


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="jaxmods",
        description="Train, evaluate, import and export the 360CVGroup systems in JAX.",
        epilog="example:\n  jaxmods fit fgclip/tiny --workdir runs/tiny\n\n" + _CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    add = _adder(commands)
    command = add("list", "list recipes", "jaxmods list --json", _list)

    command = add(
        "describe",
        "parameters, optimiser, batch and memory of a recipe, without training",
        "jaxmods describe fgclip/base_stage1 --set mesh.fsdp=4",
        _describe,
    )
    _recipe(command)

    command = add(
        "fit",
        "train; continues the run that is in the folder",
        "jaxmods fit fgclip/tiny --workdir runs/tiny --set optim.lr=5e-4 steps=2000",
        _fit,
    )
    _recipe(command)
    command.add_argument("--workdir", required=True, metavar="DIR", help="the run folder")
    command.add_argument(
        "--allow-change",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATH",
        help="continue although the recipe differs from the saved one in these paths",
    )
    command.add_argument("--no-report", action="store_true", help="do not write report.html")
    _several_hosts(command)

    command = add(
        "eval",
        "run the recipe's protocols on the newest checkpoint",
        "jaxmods eval fgclip/tiny --workdir runs/tiny --protocol scene_retrieval --json",
        _eval,
    )
    _recipe(command)
    command.add_argument(
        "--workdir", required=True, metavar="DIR", help="a run folder, or a folder of parameters"
    )
    command.add_argument(
        "--protocol",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="only these protocols",
    )
    command.add_argument(
        "--out", metavar="DIR", help="write results there instead of the run folder"
    )
    _several_hosts(command)

    command = add(
        "sample",
        "make pictures or answers with a model: of own files, or of the recipe's evaluation data",
        "jaxmods sample refton/tiny --workdir runs/tiny --out made --count 16 --seed 1",
        _sample,
    )
    _recipe(command)
    _sample_options(command)
    _several_hosts(command)

    command = add(
        "encode",
        "run the recipe's data through the system's encoders once, to train from the results",
        "jaxmods encode refton/viton_hd --weights FLUX.1-Kontext-dev --out data/encoded",
        _encode,
    )
    _recipe(command)
    _origin_options(command)
    command.add_argument("--out", required=True, metavar="DIR", help="folder for the results")
    command.add_argument(
        "--batch", type=int, default=8, metavar="N", help="records at once; default 8"
    )
    command.add_argument("--limit", type=int, metavar="N", help="only so many of each source")

    command = add(
        "report",
        "write report.html for a run folder",
        "jaxmods report runs/tiny",
        _report,
    )
    command.add_argument("workdir", metavar="WORKDIR", help="the run folder")

    command = add(
        "import",
        "PyTorch weights to a folder of parameters",
        "jaxmods import fgclip/base --from fg-clip-base --to weights/fgclip_base",
        _import,
    )
    _recipe(command)
    command.add_argument(
        "--from",
        dest="source",
        required=True,
        metavar="HF_DIR",
        help="folder or file of safetensors (or a state dict) with the published names",
    )
    command.add_argument("--to", dest="target", metavar="DIR", help="new folder")
    command.add_argument(
        "--adapters",
        metavar="FILE",
        help="adapters (LoRA) for these weights: a file or folder of PEFT, diffusers or kohya",
    )
    command.add_argument(
        "--dry-run", action="store_true", help="only show, key by key, what fits and what does not"
    )
    command.add_argument("--overwrite", action="store_true", help="replace what is in --to")

    command = add(
        "export",
        "a run or a folder of parameters to a PyTorch folder",
        "jaxmods export fgclip/tiny --from runs/tiny --to exported --verify",
        _export,
    )
    _recipe(command)
    command.add_argument(
        "--from",
        dest="source",
        required=True,
        metavar="RUN_OR_DIR",
        help="a run folder, or a folder of parameters",
    )
    command.add_argument("--to", dest="target", required=True, metavar="HF_DIR", help="new folder")
    what = command.add_mutually_exclusive_group()
    what.add_argument(
        "--adapters",
        choices=("peft", "diffusers", "kohya"),
        help="only the adapters (LoRA), in this format",
    )
    what.add_argument(
        "--merge-adapters",
        action="store_true",
        help="the whole model with its adapters merged into the weights",
    )
    command.add_argument(
        "--verify",
        action="store_true",
        help="load what was written, compare with PyTorch where it is installed, verify.json",
    )
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="convert floating tensors (default: as they are)",
    )
    command.add_argument("--overwrite", action="store_true", help="replace what is in --to")

    preflight.add_parser(commands)

    data = commands.add_parser("data", help="look at data", description="Look at data.")
    data_commands = data.add_subparsers(title="commands", metavar="COMMAND", required=True)
    command = _adder(data_commands)(
        "inspect",
        "draw samples of a recipe's data and count what matched and what did not",
        "jaxmods data inspect fgclip/tiny --out inspected --samples 16",
        _inspect,
    )
    _recipe(command)
    command.add_argument("--out", default="inspect", metavar="DIR", help="default: inspect")
    command.add_argument("--samples", type=int, default=16, metavar="N", help="default: 16")
    return parser


Run = Callable[[argparse.Namespace], int]


def _adder(commands: Any) -> Callable[[str, str, str, Run], argparse.ArgumentParser]:
    def add(name: str, text: str, example: str, run: Run) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=f"example:\n  {example}\n\n{_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        command.add_argument("--json", action="store_true", help="print the result as JSON")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return command

    return add


def _recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", metavar="RECIPE", help=_NAMES)
    command.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        dest="settings",
        metavar="PATH=VALUE",
        help="override values of the recipe by dotted path",
    )


def _origin_options(command: argparse.ArgumentParser) -> None:
    origin = command.add_argument_group("parameters (default: the recipe's init.weights)")
    where = origin.add_mutually_exclusive_group()
    where.add_argument("--workdir", metavar="RUN", help="a run folder, or a folder of parameters")
    where.add_argument(
        "--weights", metavar="FOLDER", help="PyTorch weights, or a folder of jaxmods import"
    )
    origin.add_argument(
        "--adapters", metavar="FILE", help="adapters (LoRA) of PEFT, diffusers or kohya for them"
    )


def _sample_options(command: argparse.ArgumentParser) -> None:
    _origin_options(command)
    given = command.add_argument_group(
        "inputs (default: the recipe's evaluation data)",
        "A wrong name shows which inputs the recipe has.",
    )
    given.add_argument(
        "--input",
        nargs="+",
        action="extend",
        default=[],
        dest="pairs",
        metavar="NAME=VALUE",
        help="inputs of one example: files, or texts",
    )
    given.add_argument("--image", metavar="FILE", help="short for --input image=FILE")
    given.add_argument("--prompt", metavar="TEXT", help="short for --input prompt=TEXT")
    given.add_argument(
        "--inputs", dest="file", metavar="FILE", help="JSON lines, an example a line"
    )
    given.add_argument("--start", type=int, default=0, metavar="I", help="first example; default 0")
    given.add_argument(
        "--count", type=int, metavar="N", help="examples; default 8 of the data, or all of a file"
    )
    command.add_argument("--out", metavar="DIR", help="a new folder for the results")
    command.add_argument("--overwrite", action="store_true", help="replace what is in --out")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise; default 0")
    command.add_argument(
        "--batch", type=int, metavar="N", help="examples at once; default evaluation.batch_size"
    )
    command.add_argument(
        "--format", choices=("png", "jpeg"), default="png", help="of pictures; default png"
    )
    command.add_argument(
        "--grid", type=int, default=16, metavar="N", help="examples in grid.png; default 16"
    )
    command.add_argument("--chat", action="store_true", help="talk to the model in the terminal")


def _several_hosts(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group(
        "several hosts",
        "TPU pods, GKE, Slurm and Open MPI are recognised: run the same command on every host. "
        "Elsewhere give the first three (or the variables) on every host. See docs/multi_host.md.",
    )
    group.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help=f"where process 0 runs ({distributed.COORDINATOR})",
    )
    group.add_argument(
        "--num-processes",
        type=int,
        metavar="N",
        help=f"how many take part ({distributed.NUM_PROCESSES})",
    )
    group.add_argument(
        "--process-id",
        type=int,
        metavar="I",
        help=f"number of this one, from 0 ({distributed.PROCESS_ID})",
    )
    group.add_argument(
        "--coordinator-port",
        type=int,
        metavar="PORT",
        help=f"where none is named; default {distributed.DEFAULT_PORT} ({distributed.PORT})",
    )
    group.add_argument(
        "--no-distributed",
        action="store_true",
        help=f"one process alone, whatever the surroundings ({distributed.OFF}=1)",
    )


def _job(options: argparse.Namespace) -> AbstractContextManager[None]:
    """The command as one process of a job of several, where there are several."""
    return distributed.job(
        distributed.Wanted(
            options.coordinator,
            options.num_processes,
            options.process_id,
            options.coordinator_port,
            options.no_distributed,
        )
    )


# Each command imports what it needs when it runs.


def _list(options: argparse.Namespace) -> int:
    from train import commands

    return commands.list_recipes(as_json=options.json)


def _describe(options: argparse.Namespace) -> int:
    from train import commands

    return commands.describe_recipe(options.recipe, options.settings, as_json=options.json)


def _fit(options: argparse.Namespace) -> int:
    with _job(options):  # before anything can touch a device
        from train import commands

        return commands.fit_recipe(
            options.recipe,
            options.settings,
            options.workdir,
            allow_change=options.allow_change,
            report=not options.no_report,
            as_json=options.json,
        )


def _eval(options: argparse.Namespace) -> int:
    with _job(options):  # before anything can touch a device
        from train import commands

        return commands.evaluate_run(
            options.recipe,
            options.settings,
            options.workdir,
            protocols=options.protocol,
            out=options.out,
            as_json=options.json,
        )


def _sample(options: argparse.Namespace) -> int:
    with _job(options):  # before anything can touch a device
        from train import commands
        from train.sample import Given, Origin

        short = (("image", options.image), ("prompt", options.prompt))
        pairs = [*options.pairs, *(f"{name}={v}" for name, v in short if v is not None)]
        return commands.sample_recipe(
            options.recipe,
            options.settings,
            Origin(options.workdir, options.weights, options.adapters),
            Given(tuple(pairs), options.file, options.start, options.count, options.seed),
            options.out,
            batch=options.batch,
            kind=options.format,
            sheet=options.grid,
            chat=options.chat,
            overwrite=options.overwrite,
            as_json=options.json,
        )


def _encode(options: argparse.Namespace) -> int:
    from train import commands
    from train.sample import Origin

    return commands.encode_recipe(
        options.recipe,
        options.settings,
        Origin(options.workdir, options.weights, options.adapters),
        options.out,
        batch=options.batch,
        limit=options.limit,
        as_json=options.json,
    )


def _report(options: argparse.Namespace) -> int:
    from train import commands

    return commands.report_run(options.workdir, as_json=options.json)


def _import(options: argparse.Namespace) -> int:
    from train import commands

    if options.target is None and not options.dry_run:
        raise UsageError("import: expected --to DIR, or --dry-run to look only")
    return commands.import_folder(
        options.recipe,
        options.settings,
        options.source,
        None if options.dry_run else options.target,
        adapters=options.adapters,
        overwrite=options.overwrite,
        as_json=options.json,
    )


def _export(options: argparse.Namespace) -> int:
    from train import commands

    return commands.export_folder(
        options.recipe,
        options.settings,
        options.source,
        options.target,
        adapters=options.adapters,
        merged=options.merge_adapters,
        verify=options.verify,
        dtype=options.dtype,
        overwrite=options.overwrite,
        as_json=options.json,
    )


def _inspect(options: argparse.Namespace) -> int:
    from train import commands

    if options.samples < 1:
        raise UsageError(f"--samples: expected 1 or more, found {options.samples}")
    return commands.inspect_data(
        options.recipe, options.settings, options.out, options.samples, as_json=options.json
    )
