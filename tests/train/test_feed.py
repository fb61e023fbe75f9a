"""Reading ahead, checking the first batch, and counting what was left out."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from data_pipelines.batch import BatchInfo, DataError, HostBatch, Quarantined
from jaxmods.partitioning import MeshShape, make_mesh, sharding_for
from tests.train.toy import Numbers, Regression
from train.exits import UserError
from train.feed import Feed, Ledger, Shares, check_batch, divide, keep_lines, local_shares

SPEC = Regression().batch_spec(8)


def open_feed(pipeline: Numbers, start: int = 0) -> Feed:
    mesh = make_mesh(MeshShape(), jax.devices()[:1])
    shardings = {k: sharding_for(s.shape, s.axes, mesh) for k, s in SPEC.items()}
    return Feed(pipeline, SPEC, shardings, global_batch=8, seed=3, start_step=start)


def records(feed: Feed) -> tuple[str, ...]:
    """Records of the next batch."""
    return tuple(record for _, info in feed.take().story for record in info.record_ids)


def test_batches_are_those_of_their_step() -> None:
    first = open_feed(Numbers())
    ids = [records(first) for _ in range(4)]
    first.close()
    later = open_feed(Numbers(), start=2)
    assert [records(later) for _ in range(2)] == ids[2:]
    later.close()
    assert later.waited > 0


def test_first_batch_is_checked_before_any_step() -> None:
    feed = open_feed(Numbers(dtype="float64"))
    with pytest.raises(UserError, match=r"x: expected float32 \[8, 8\], found float64 \[8, 8\]"):
        feed.take()
    feed.close()


def test_all_that_differs_is_named() -> None:
    arrays = {"xs": np.zeros((8, 8), np.float32), "y": np.zeros((8, 3), np.float32)}
    with pytest.raises(UserError) as caught:
        check_batch(HostBatch(arrays, BatchInfo()), SPEC, 1)
    message = str(caught.value)
    assert "x: missing (found 'xs': is that it?)" in message
    assert "y: expected float32 [8, 4], found float32 [8, 3]" in message
    assert "xs: not an array of this system's batch" in message


def test_errors_of_the_pipeline_arrive_in_the_loop() -> None:
    feed = open_feed(Numbers(fail_at=1))
    feed.take()
    with pytest.raises(DataError, match="2 of 3 records"):
        feed.take()
    feed.close()


def test_one_process_reads_everything_whatever_the_mesh() -> None:
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    shardings = {k: sharding_for(s.shape, s.axes, mesh) for k, s in SPEC.items()}
    assert local_shares(shardings, SPEC) == Shares((0,), 1)


def spans(*rows: int) -> list[tuple[int, int]]:
    """Devices that hold four rows each, by their place along the batch."""
    return [(4 * row, 4 * row + 4) for row in rows]


def test_shares_follow_the_blocks_of_a_host() -> None:
    alone = {0: spans(0, 1, 2, 3)}
    assert divide(alone, 16, 0) == Shares((0,), 1)
    in_order = {0: spans(0, 1), 1: spans(2, 3)}
    assert divide(in_order, 16, 1) == Shares((1,), 2)
    # Hosts of 2 x 2 chips on a torus of 4 x 4, as the TPU runtime numbers them: data=4, fsdp=4.
    torus = {
        0: spans(0, 1, 4, 5),
        1: spans(2, 3, 6, 7),
        2: spans(8, 9, 12, 13),
        3: spans(10, 11, 14, 15),
    }
    shares = [divide(torus, 64, host) for host in range(4)]
    assert shares[0] == Shares((0, 2), 8)
    assert sorted(i for s in shares for i in s.indices) == list(range(8))
    # The same with data=16, where the path through the torus turns back.
    path = {0: spans(0, 1, 6, 15), 1: spans(*range(2, 6)), 2: spans(*range(7, 15))}
    assert divide(path, 64, 0) == Shares((0, 1, 6, 15), 16)
    # Two hosts that hold the same rows (tensor parallelism between them) read the same.
    both = {0: spans(0), 1: spans(0), 2: spans(1), 3: spans(1)}
    assert [divide(both, 8, host) for host in range(4)] == [
        Shares((0,), 2), Shares((0,), 2), Shares((1,), 2), Shares((1,), 2)
    ]  # fmt: skip


def bad(n: int, reason: str = "truncated_image") -> Quarantined:
    return Quarantined("folder", str(n), reason, "detail")


def test_ledger_writes_each_record_once_and_continues_exactly(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.enter(BatchInfo(("a", "b"), (bad(1), bad(2)), {"boxes": 3}, 4, {"box_clipped": 1}), 0)
    saved = ledger.state()
    ledger.enter(BatchInfo(("c",), (bad(1), bad(2, "box_nan")), {"boxes": 1}, 3), 1)
    final = ledger.state()
    ledger.close()
    assert final == {
        "seen": 7,
        "used": 3,
        "quarantine": {
            "box_nan": {"records": 1, "met": 1},
            "truncated_image": {"records": 2, "met": 3},
        },
        "repaired": {"box_clipped": 1},
        "cut": {"boxes": 4},
    }
    path = tmp_path / "quarantine.jsonl"
    complete = path.read_text()
    assert len(complete.splitlines()) == 3
    path.write_text(complete + '{"step": 1, "sour')  # killed while writing

    again = Ledger(tmp_path, saved, step=1)
    assert len(path.read_text().splitlines()) == 2
    again.enter(BatchInfo(("c",), (bad(1), bad(2, "box_nan")), {"boxes": 1}, 3), 1)
    assert again.state() == final
    assert "quarantined box_nan 1, truncated_image 2" in again.line()
    again.close()
    assert path.read_text() == complete


def test_keep_lines_drops_what_is_torn(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert keep_lines(path, lambda entry: True) == []
    path.write_text('{"step": 1}\n{"step": 2}\nnonsense\n{"step": 3}\n{"st')
    assert keep_lines(path, lambda entry: entry["step"] <= 2) == [{"step": 1}, {"step": 2}]
    assert [json.loads(x) for x in path.read_text().splitlines()] == [{"step": 1}, {"step": 2}]
