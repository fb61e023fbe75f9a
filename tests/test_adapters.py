"""Adapters from the command line: trained, exported alone and merged, imported, continued."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmods.backbones.flux import FluxConfig
from jaxmods.nn import lora
from jaxmods.nn.lora.adapters import Factors
from jaxmods.nn.lora.binding import _narrowed
from jaxmods.partitioning import make_mesh, unbox
from jaxmods.system import Params
from jaxmods.systems.flux.base import FluxBase
from jaxmods.systems.flux.weights import abstract_transformer, adapter_map, target_paths
from jaxmods.systems.refton.system import TARGETS
from jaxmods.weights import WeightError
from jaxmods.weights.map import flatten
from jaxmods.weights.reader import PIPELINE
from tests.lora_toy import Adapted, Adapters, adapted
from train import commands
from train.adapters import merge_adapters, read_adapters, write_adapters
from train.checkpoint import load_params, load_run_params, read_facts
from train.cli import build_parser, main
from train.exits import ExitCode, UserError
from train.interchange import abstract_params, export_weights, import_weights, read_params
from train.recipes import RECIPE_FILE
from train.state import make_plan

RECIPE = "tests.lora_toy:adapted"
DIALECTS: tuple[lora.Dialect, ...] = get_args(lora.Dialect)
SYSTEM = Adapted()


@pytest.fixture(autouse=True, scope="module")
def _logging_as_before() -> Iterator[None]:
    """The command line takes the log for itself; give it back."""
    log, absl = logging.getLogger("train"), logging.getLogger("absl")
    saved = (log.handlers[:], log.level, log.propagate, absl.level)
    yield
    log.handlers[:], log.level, log.propagate, absl.level = saved


def command(*words: Any) -> int:
    return main([str(word) for word in words])


def export(source: Path, to: Path, *options: Any) -> int:
    return command("export", RECIPE, "--from", source, "--to", to, *options)


def fit(workdir: Path, *settings: str) -> int:
    return command("fit", RECIPE, "--workdir", workdir, "--no-report", "--set", *settings)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base as a pipeline folder, with a tokenizer."""
    folder = tmp_path_factory.mktemp("base") / "hub"
    plain = dataclasses.replace(SYSTEM, adapters=None)
    export_weights(plain, unbox(plain.init(jax.random.key(0))), folder)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text("{}")
    index = json.loads((folder / PIPELINE).read_text())
    (folder / PIPELINE).write_text(json.dumps({**index, "tokenizer": ["tests", "T"], "x": [1, 2]}))
    return folder


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on that base."""
    folder = tmp_path_factory.mktemp("run") / "run"
    assert fit(folder, f"init.weights={base}") == ExitCode.OK
    return folder


@pytest.fixture(scope="module")
def params(finished: Path) -> Params:
    """What the run ended with."""
    experiment = adapted()
    plan = make_plan(experiment, make_mesh(experiment.mesh))
    found, step = load_run_params(finished, plan)
    assert step == 4
    assert all(np.any(leaf) for leaf in jax.tree.leaves(found["lora"]))
    return found


def equal(one: Any, two: Any) -> bool:
    return all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    )


def last_json(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


# --- what is saved -------------------------------------------------------------------------------


def test_checkpoints_hold_what_trains_and_the_base_lies_there_once(
    finished: Path, params: Params
) -> None:
    """Frozen bfloat16 kernels are in no step's folder, nor anything of their size."""

    def stored(folder: Path) -> int:
        return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())

    names = {p.name for step in (finished / "checkpoints").iterdir() for p in step.iterdir()}
    assert "trained" in names
    assert not any("frozen" in name for name in names)
    assert equal(load_params(finished / "frozen", like=abstract_frozen()), {"net": params["net"]})
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params["net"])} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params["lora"])} == {"float32"}
    first, last = (stored(finished / "checkpoints" / n / "trained") for n in ("2", "4"))
    assert first == pytest.approx(last, rel=0.2)


def abstract_frozen() -> Params:
    experiment = adapted()
    return make_plan(experiment, make_mesh(experiment.mesh)).abstract.frozen


# --- adapters alone ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The run's adapters in each format; the base is not there any more."""
    run = tmp_path_factory.mktemp("bare") / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "frozen")
    folders: dict[str, Path] = {}
    for dialect in DIALECTS:
        folders[dialect] = run.parent / dialect
        code = export(run, folders[dialect], "--adapters", dialect, "--verify")
        assert code == ExitCode.OK
    return folders


@pytest.mark.parametrize("dialect", DIALECTS)
def test_adapters_come_back_to_the_bit(
    exported: dict[str, Path], params: Params, dialect: str
) -> None:
    """Also through kohya's names, under which q, v and the MLP are one projection with k."""
    folder = exported[dialect]
    certificate = json.loads((folder / "verify.json").read_text())
    assert certificate["passed"]
    assert certificate["bit_equal"]
    assert certificate["forward"].startswith("not compared: adapters alone")
    (file,) = folder.glob("*.safetensors")
    assert set(certificate["sha256"]) == {file.name}
    assert certificate["tensors"] == len(load_file(file))
    fresh = unbox(SYSTEM.init(jax.random.key(8)))
    found, loaded = read_adapters(SYSTEM, fresh, folder)
    assert equal(found["lora"], params["lora"])
    assert found["net"] is fresh["net"]
    assert (loaded.dialect, loaded.config.scale) == (dialect, 1.5)
    assert len(folder.joinpath(file).read_bytes()) < 20_000


def test_kohya_files_have_the_names_of_the_original(exported: dict[str, Path]) -> None:
    keys = load_file(exported["kohya"] / "lora.safetensors").keys()
    assert "lora_net_single_blocks_0_linear1.lora_down.weight" in keys
    keys = load_file(exported["diffusers"] / "pytorch_lora_weights.safetensors").keys()
    assert "net.blocks.0.attn.to_q.lora_A.weight" in keys


def test_peft_computes_the_same(exported: dict[str, Path], params: Params) -> None:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from tests.parity.test_lora_live import relative, torch_net

    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    theirs = peft.PeftModel.from_pretrained(torch_net(wide["net"]), exported["peft"])
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 8)), jnp.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(np.asarray(x[:, :6])))[:, :4].numpy()
        bare = torch_net(wide["net"])(torch.tensor(np.asarray(x[:, :6])))[:, :4].numpy()
    assert relative(SYSTEM.predict(wide, x), expected) < 1e-5  # float32 sums in another order
    assert relative(bare, expected) > 1e-3


def test_narrower_adapters_verify_and_damaged_ones_do_not(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "bf16"
    words = ("--adapters", "diffusers", "--dtype", "bfloat16")
    assert export(finished, to, *words, "--verify", "--json") == ExitCode.OK
    said = last_json(capsys)
    assert said["verify"]["passed"]
    assert said["adapters"] == {"format": "diffusers", "modules": 3 * 4 + 1}
    assert said["step"] == 4
    # The same file does not hold the float32 values.
    certificate = commands_verify(finished, to)
    assert not certificate.passed
    assert certificate.differing[0].startswith("blocks/")
    assert export(finished, to, *words) == ExitCode.ERROR
    assert "exists already" in capsys.readouterr().err


def commands_verify(run: Path, folder: Path) -> Any:
    from train.adapters import verify_adapters

    recipe, plan = commands._recipe_and_plan(RECIPE, ())
    params, _ = commands._adapters_of(run, recipe, plan)
    return verify_adapters(SYSTEM, params, folder)


def test_the_command_line_knows_every_format() -> None:
    for dialect in DIALECTS:
        options = build_parser().parse_args(
            ["export", RECIPE, "--from", "a", "--to", "b", "--adapters", dialect]
        )
        assert options.adapters == dialect
    with pytest.raises(SystemExit):
        build_parser().parse_args(
            ["export", RECIPE, "--from", "a", "--to", "b", "--adapters", "peft", "--merge-adapters"]
        )


# --- continued -----------------------------------------------------------------------------------


def test_a_run_continues_adapters_and_is_resumed_without_their_file(
    base: Path, exported: dict[str, Path], params: Params, tmp_path: Path
) -> None:
    """Nothing moves at a learning rate of zero, so the end shows the beginning."""
    source, run = tmp_path / "lora", tmp_path / "run"
    shutil.copytree(exported["kohya"], source)
    settings = [f"init.weights={base}", f"init.adapters={source}", "steps=2"]
    assert fit(run, *settings, "optim.lr=0") == ExitCode.OK
    experiment = adapted()
    plan = make_plan(experiment, make_mesh(experiment.mesh))
    assert equal(load_run_params(run, plan)[0], params)
    assert "adapters of " in (run / "log.txt").read_text()
    # Neither file is read again.
    shutil.rmtree(source)
    words = ["--allow-change", "steps", "optim.lr", "init.weights", "--set"]
    later = [f"init.weights={tmp_path / 'gone'}", settings[1], "steps=4"]
    assert command("fit", RECIPE, "--workdir", run, "--no-report", *words, *later) == ExitCode.OK
    assert not equal(load_run_params(run, plan)[0]["lora"], params["lora"])


def test_a_run_from_before_the_setting_goes_on(finished: Path, base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    document = json.loads((run / RECIPE_FILE).read_text())
    del document["experiment"]["init"]["adapters"]
    (run / RECIPE_FILE).write_text(json.dumps(document))
    assert fit(run, f"init.weights={base}") == ExitCode.OK
    assert fit(run, f"init.weights={base}", "init.adapters=a") == ExitCode.ERROR


def test_adapters_need_their_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(tmp_path / "run", "init.adapters=a") == ExitCode.ERROR
    assert "expected the base that they were trained on in init.weights" in capsys.readouterr().err


def test_import_with_adapters(
    base: Path, exported: dict[str, Path], params: Params, tmp_path: Path, capsys: Any
) -> None:
    source, to = exported["peft"], tmp_path / "native"
    words = ("import", RECIPE, "--from", base, "--adapters", source)
    assert command(*words, "--dry-run") == ExitCode.OK
    text = capsys.readouterr().out
    assert f"adapters of 13 modules from {source} (peft): rank 2, alpha 3 (from its config)" in text
    assert command(*words, "--to", to) == ExitCode.OK
    found = read_params(SYSTEM, to)
    assert equal(found["lora"], params["lora"])
    assert read_facts(to)["adapters_from"] == str(source)
    # As one folder, the adapters come out again.
    out = tmp_path / "out"
    assert export(to, out, "--adapters", "peft") == ExitCode.OK
    name = "adapter_model.safetensors"
    assert (out / name).read_bytes() == (source / name).read_bytes()


# --- merged --------------------------------------------------------------------------------------


def test_merged_export_computes_what_the_adapters_do(
    finished: Path, base: Path, params: Params, tmp_path: Path, capsys: Any
) -> None:
    to = tmp_path / "merged"
    words = ("--merge-adapters", "--verify", "--dtype", "float32", "--json")
    assert export(finished, to, *words, "--set", f"init.weights={base}") == ExitCode.OK
    said = last_json(capsys)["verify"]
    assert said["passed"]
    assert set(said["sha256"]) == {"net/model.safetensors"}
    # The whole published folder: also what the base's had besides weights, and says of it.
    index = json.loads((to / PIPELINE).read_text())
    expected = {"net": ["tests", "TorchNet"], "tokenizer": ["tests", "T"], "_class_name": "Toy"}
    assert index == expected
    assert (to / "tokenizer" / "vocab.json").read_text() == "{}"

    plain = dataclasses.replace(SYSTEM, adapters=None)
    merged = import_weights(plain, to)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 8)), jnp.float32)
    attached = SYSTEM.predict(wide, x)
    # float32 products in another order: the base was widened before the sum.
    np.testing.assert_allclose(plain.predict(merged, x), attached, atol=2e-6)
    bare = SYSTEM.predict(unbox({**wide, "lora": jax.tree.map(jnp.zeros_like, wide["lora"])}), x)
    assert np.abs(bare - attached).max() > 1e-3

    narrow = merge_adapters(SYSTEM, params)[1]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(narrow)} == {"bfloat16"}
    assert export(finished, tmp_path / "narrow", "--merge-adapters", "--verify") == ExitCode.OK
    assert ", merged" in capsys.readouterr().out
    assert equal(import_weights(plain, tmp_path / "narrow", dtype=None), narrow)


def test_plain_export_keeps_both_apart(finished: Path, params: Params, tmp_path: Path) -> None:
    to = tmp_path / "plain"
    assert export(finished, to, "--verify") == ExitCode.OK
    assert equal(import_weights(SYSTEM, to, dtype=None), params)


# --- what does not fit ---------------------------------------------------------------------------


def write(system: Adapted, folder: Path, *, skip: str = "-") -> Path:
    """Adapters of random numbers for `system`, without the tensors whose key holds `skip`."""
    rng = np.random.default_rng(0)
    abstract = abstract_params(system)
    drawn = jax.tree.map(lambda s: rng.standard_normal(s.shape, np.float32), abstract["lora"])
    write_adapters(system, {**abstract, "lora": drawn}, folder, dialect="diffusers")
    file = folder / "pytorch_lora_weights.safetensors"
    save_file({k: v for k, v in load_file(file).items() if skip not in k}, file)
    return folder


@pytest.mark.parametrize(
    ("file", "skip", "message"),
    [
        (Adapters(rank=4), "-", r"expected rank 2, found 4; set system\.adapters\.rank=4"),
        (
            Adapters(targets=("attn.to_q", "attn.to_k", "mlp", "proj_out")),
            "-",
            r"expected adapters on attn\.to_q,attn\.to_v,mlp,proj_out, found none on attn\.to_v, "
            r"some on attn\.to_k as well; set "
            r"system\.adapters\.targets=attn\.to_k,attn\.to_q,mlp,proj_out",
        ),
        (
            Adapters(rank=1, targets=("attn.to_q",)),
            "-",
            r"found none on attn\.to_v,mlp,proj_out; set system\.adapters\.targets=attn\.to_q; "
            r"expected rank 2, found 1; set system\.adapters\.rank=1",
        ),
        (
            Adapters(),
            "blocks.1.attn.to_q",
            "all layers of blocks/to_q/kernel, found none in 1; adapters of some layers cannot be "
            "continued, merge",
        ),
        (Adapters(), "lora_B", "no up matrix"),
    ],
)
def test_other_adapters_are_refused_by_name(
    tmp_path: Path, file: Adapters, skip: str, message: str
) -> None:
    folder = write(Adapted(adapters=file), tmp_path / "lora", skip=skip)
    with pytest.raises(UserError, match=message) as caught:
        read_adapters(SYSTEM, abstract_params(SYSTEM), folder)
    assert str(folder) in str(caught.value)


def test_ranks_that_differ_between_modules_are_named(tmp_path: Path) -> None:
    wide = write(Adapted(adapters=Adapters(rank=2, targets=("proj_out",))), tmp_path / "wide")
    thin = write(
        Adapted(adapters=Adapters(rank=1, targets=("attn.to_q", "attn.to_v", "mlp"))),
        tmp_path / "thin",
    )
    name = "pytorch_lora_weights.safetensors"
    (tmp_path / "both").mkdir()
    save_file({**load_file(wide / name), **load_file(thin / name)}, tmp_path / "both" / name)
    message = r"rank 2 everywhere, found 1 at blocks/mlp/kernel and 2 at blocks/out/kernel"
    adapters = SYSTEM.adapter_map()
    assert adapters is not None
    with pytest.raises(WeightError, match=message):
        adapters.read(tmp_path / "both", abstract_params(SYSTEM))


def test_recipes_without_adapters_say_so(
    finished: Path, base: Path, tmp_path: Path, capsys: Any
) -> None:
    plain = ("--set", "system.adapters=none")
    words = ("import", RECIPE, "--from", base, "--to", tmp_path / "x", "--adapters", tmp_path)
    assert command(*words, *plain) == ExitCode.ERROR
    assert "Adapted: expected adapters, found none in this recipe" in capsys.readouterr().err
    assert command("import", RECIPE, "--from", base, "--to", tmp_path / "p", *plain) == ExitCode.OK
    for option in (("--adapters", "peft"), ("--merge-adapters",)):
        assert export(tmp_path / "p", tmp_path / "y", *plain, *option) == ExitCode.ERROR
        assert "expected adapters, found none" in capsys.readouterr().err


@pytest.mark.parametrize("targets", [TARGETS, ("attn.to_q", "ff.net.2")], ids=["all", "some"])
def test_flux_in_every_format(tmp_path: Path, targets: tuple[str, ...]) -> None:
    """Also where only a part of a fused projection of kohya's files is adapted."""
    flux = FluxConfig(
        in_channels=64,
        out_channels=64,
        double_layers=2,
        single_layers=2,
        heads=2,
        head_dim=16,
        text_width=12,
        pooled_width=10,
        rope_axes=(4, 6, 6),
    )
    config = lora.LoraConfig(target_paths(flux, targets), rank=2, alpha=3.0)
    adapters = adapter_map(FluxBase(transformer=flux, encoders=None), config, SYSTEM, "owner/base")
    base = abstract_transformer(flux)
    shapes = unbox(jax.eval_shape(lambda: lora.init(jax.random.key(0), base, config)))
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(lambda s: rng.standard_normal(s.shape, np.float32), shapes)
    params = {"transformer": base, "lora": drawn}
    for dialect in DIALECTS:
        ranks = adapters.write(tmp_path / dialect, params, dialect=dialect)
        assert any("double_blocks" in name for name in ranks) == (dialect == "kohya")
        found = adapters.read(tmp_path / dialect, params)
        assert equal(found.adapters, drawn)
        assert found.dialect == dialect


def test_ranks_in_use_keep_their_order() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 5, 6)), rng.standard_normal((2, 6, 4))
    b[0, [0, 3, 4, 5]] = 0  # in use: 1, 2
    b[1, [0, 1, 2, 3, 4]] = 0  # in use: 5; filled up with the first of the others
    found = _narrowed(Factors(a, b), 2)
    np.testing.assert_array_equal(found.a, np.stack([a[0][:, [1, 2]], a[1][:, [0, 5]]]))
    np.testing.assert_array_equal(found.b, np.stack([b[0][[1, 2]], b[1][[0, 5]]]))
    whole = Factors(a, rng.standard_normal((2, 6, 4)))
    assert _narrowed(whole, 2) is whole


def test_scales_are_carried_over(exported: dict[str, Path], params: Params) -> None:
    """The file has 3/2, the recipe 6/2: half of the factor b."""
    other = Adapted(adapters=Adapters(alpha=6.0))
    found = read_adapters(other, unbox(other.init(jax.random.key(0))), exported["peft"])[0]["lora"]
    ours, theirs = flatten(found), flatten(params["lora"])
    for path, leaf in ours.items():
        np.testing.assert_array_equal(leaf, theirs[path] * (0.5 if path.endswith("/b") else 1))
