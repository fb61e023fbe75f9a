"""`fit`: continuing, stopping, refusing, and what it leaves in the run folder."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from data_pipelines.batch import DataError
from tests.train.toy import Numbers, Regression, regression
from train.canonical import canonical, recipe_hash
from train.checkpoint import save_params
from train.exits import NonFiniteError, UserError
from train.experiment import Checkpointing, Evaluation, Experiment, Logging, Optim
from train.loop import FitResult, fit
from train.overrides import apply_overrides

QUICK = dataclasses.replace(
    regression(), evaluation=Evaluation(), logging=Logging(every=4, tensorboard=False)
)
TIMES = {"examples_per_second", "data_wait", "mfu", "peak_memory_gib"}


def lines(folder: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without what depends on the clock."""
    text = (folder / "metrics.jsonl").read_text()
    entries = [json.loads(x) for x in text.splitlines()]
    return [{k: v for k, v in e.items() if k not in TIMES} for e in entries]


def same(a: FitResult, b: FitResult) -> None:
    for x, y in zip(jax.tree.leaves(a.state), jax.tree.leaves(b.state), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def terminate_when(path: Path, step: int) -> threading.Thread:
    """A thread that sends this process SIGTERM once a log line of `step` is written."""
    return act_when(path, step, lambda: os.kill(os.getpid(), signal.SIGTERM))


def act_when(path: Path, step: int, act: Callable[[], Any]) -> threading.Thread:
    """A thread that acts once a log line of `step` is written."""

    def watch() -> None:
        deadline = time.time() + 60
        while time.time() < deadline:
            if path.exists() and f'"step": {step},' in path.read_text():
                act()
                return
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> FitResult:
    """One uninterrupted run with everything on."""
    return fit(regression(), tmp_path_factory.mktemp("whole"), name="toy")


def test_a_run_leaves_everything_that_a_person_needs(whole: FitResult) -> None:
    folder = whole.workdir
    assert (whole.status, whole.step) == ("finished", 20)
    entries = lines(folder)
    trained = [e for e in entries if "loss" in e]
    assert [e["step"] for e in trained] == [4, 8, 12, 16, 20]
    assert {"loss", "running", "grad_norm", "update_norm", "lr/head", "lr/train"} <= set(trained[0])
    assert trained[-1]["loss"] < trained[1]["loss"]
    assert [e["step"] for e in entries if "eval/fit/error" in e] == [0, 10, 20]
    assert list((folder / "tensorboard").iterdir())

    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["step"], summary["examples"]) == ("finished", 20, 160)
    assert summary["recipe_hash"] == recipe_hash(canonical(regression()))
    assert summary["parameters"] == {"trained": 208, "frozen": 64}
    assert summary["evaluation"]["step"] == 20
    error = summary["evaluation"]["results"][0]["metrics"]["error"]
    assert error["value"] == pytest.approx(entries[-1]["eval/fit/error"])
    assert summary["counters"] == json.loads((folder / "counters.json").read_text())

    written = [json.loads(x) for x in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(int(e["id"]) for e in written) == [0, 9, 18, 27, 36, 45, 54, 63]
    counters = summary["counters"]
    met = counters["quarantine"]["truncated_image"]
    assert met["records"] == 8
    assert met["met"] == counters["seen"] - counters["used"]
    assert counters["used"] == 160
    assert counters["cut"] == {"boxes": 160}
    log = (folder / "log.txt").read_text()
    assert "compiling train step" in log
    assert "quarantined truncated_image 8" in log


def test_evaluation_uses_the_average_and_pads_ragged_ends(whole: FitResult) -> None:
    pairs = [Numbers()._record(123, n) for n in range(10)]
    x, y = (np.stack(p).astype(np.float32) for p in zip(*pairs, strict=True))
    expected = np.mean(np.square(Regression().predict(whole.state.averaged, x) - y))
    assert whole.results["fit"].metrics["error"].value == pytest.approx(expected, rel=1e-5)


def test_a_finished_run_is_left_as_it_is(whole: FitResult) -> None:
    before = lines(whole.workdir)
    again = fit(regression(), whole.workdir, name="toy")
    assert (again.status, again.step) == ("finished", 20)
    same(whole, again)
    assert lines(whole.workdir) == before


def test_sigterm_saves_and_the_same_call_continues_bit_for_bit(
    whole: FitResult, tmp_path: Path
) -> None:
    slow = dataclasses.replace(regression(), data=Numbers(damaged=9, pause=0.1))
    sender = terminate_when(tmp_path / "metrics.jsonl", 8)
    stopped = fit(slow, tmp_path, name="toy")
    sender.join()
    assert stopped.status == "preempted"
    assert 8 <= stopped.step < 20
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "preempted"
    finished = fit(slow, tmp_path, name="toy")
    assert finished.status == "finished"
    same(whole, finished)
    assert lines(tmp_path) == lines(whole.workdir)
    for name in ("counters.json", "quarantine.jsonl"):
        assert (tmp_path / name).read_text() == (whole.workdir / name).read_text()


def test_a_folder_that_vanishes_ends_the_run(tmp_path: Path) -> None:
    folder, gone = tmp_path / "run", tmp_path / "gone"
    slow = apply_overrides(QUICK, ["data.pause=0.1"])
    mover = act_when(folder / "metrics.jsonl", 4, lambda: folder.rename(gone))
    with pytest.raises(UserError, match="run: the run folder has vanished"):
        fit(slow, folder)
    mover.join()
    assert not folder.exists()  # nothing was begun anew in its place
    gone.rename(folder)
    assert fit(slow, folder).status == "finished"


def test_a_full_disk_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = ocp.JsonCheckpointHandler._save_fn

    async def full(self: Any, value: Any, directory: Any) -> None:
        if value["info"]["next_step"] > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        await written(self, value, directory)

    with monkeypatch.context() as patch:
        patch.setattr(ocp.JsonCheckpointHandler, "_save_fn", full)
        with pytest.raises(UserError, match=r"no space left \(.* last complete checkpoint"):
            fit(QUICK, tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()] == ["5"]
    assert fit(QUICK, tmp_path).status == "finished"
    assert "continuing from step 5" in (tmp_path / "log.txt").read_text()


def test_nan_stops_with_the_records_and_a_clean_state(tmp_path: Path) -> None:
    bad = apply_overrides(QUICK, ["data.poison=6", "checkpoint.every=100"])
    with pytest.raises(NonFiniteError, match=r"step 6 is not finite.*numbers:") as caught:
        fit(bad, tmp_path / "bad")
    (batch,) = (b for b in [next(bad.data.batches(global_batch=8, seed=3, start_step=6))])
    assert caught.value.record_ids == batch.info.record_ids
    noted = json.loads((tmp_path / "bad/nonfinite.json").read_text())
    assert (noted["step"], tuple(noted["record_ids"])) == (6, batch.info.record_ids)
    # the state before it was saved, and is that of a run that saw nothing bad
    mended = apply_overrides(bad, ["data.poison=none"])
    with pytest.raises(UserError, match=r"data\.poison: 6 → null"):
        fit(mended, tmp_path / "bad")
    continued = fit(mended, tmp_path / "bad", allow_change=["data.poison"])
    assert "continuing from step 6" in (tmp_path / "bad/log.txt").read_text()
    clean = fit(mended, tmp_path / "clean")
    same(clean, continued)
    assert lines(tmp_path / "bad") == lines(tmp_path / "clean")


def test_data_that_cannot_be_used_stops_with_the_state_saved(tmp_path: Path) -> None:
    broken = apply_overrides(QUICK, ["data.fail_at=3", "checkpoint.every=100"])
    with pytest.raises(DataError, match="2 of 3 records"):
        fit(broken, tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["3"]


def test_other_data_is_refused_by_its_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = dataclasses.replace(QUICK, steps=4)
    fit(short, tmp_path)
    monkeypatch.setattr(Numbers, "fingerprint", lambda self: "other files")
    with pytest.raises(UserError, match=r"numbers-64-9 → other files.*--allow-change data"):
        fit(short, tmp_path)
    assert fit(short, tmp_path, allow_change=["data"]).step == 4


@dataclasses.dataclass(frozen=True)
class Deaf(Regression):
    """The head's gradient never arrives."""

    def predict(self, params: Any, x: jax.Array) -> jax.Array:
        return super().predict({**params, "out": jax.lax.stop_gradient(params["out"])}, x)


def long(system: Regression) -> Experiment:
    return dataclasses.replace(
        QUICK,
        system=system,
        steps=101,
        optim=Optim(),
        data=Numbers(),
        checkpoint=Checkpointing(every=1000),
    )


def test_a_group_that_never_changes_fails_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tensor of group 'head' differs.*after 100 steps"):
        fit(long(Deaf()), tmp_path)


def test_a_tensor_that_never_changes_is_named(tmp_path: Path) -> None:
    fit(long(Regression(idle=True)), tmp_path)
    assert "not changed after 100 steps: idle/scale" in (tmp_path / "log.txt").read_text()


def test_training_starts_from_given_parameters(whole: FitResult, tmp_path: Path) -> None:
    save_params(tmp_path / "weights", whole.state.averaged, {"step": 20})
    start = apply_overrides(
        regression(), ["steps=4", f"init.weights={tmp_path / 'weights'}", "optim.ema_decay=none"]
    )
    fit(start, tmp_path / "run")
    first = next(e["eval/fit/error"] for e in lines(tmp_path / "run") if "eval/fit/error" in e)
    assert first == whole.results["fit"].metrics["error"].value
    other = apply_overrides(start, ["system.width=8"])
    with pytest.raises(UserError, match=r"hidden/bias: expected \(8,\), found \(16,\)"):
        fit(other, tmp_path / "other")
