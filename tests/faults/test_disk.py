"""Full disks: an error is said, the run goes on, the checkpoint before stays."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ledger import Ledger
from lives import Nursery

from runs import differences, newest_whole, note_comparison, note_end

SHORT = {"optim": {"steps": 3}, "evaluation": {"every": 2}, "checkpoint": {"every": 1, "keep": 1}}


@pytest.mark.timeout(2400)
@pytest.mark.parametrize("rank", [0, 1])
def test_an_operation_that_the_disk_refuses(
    rank: int, recipe: Callable, nursery: Nursery, ledger: Ledger, tmp_path: Path
) -> None:
    """Every seventh. What is refused before there is a run ends it; later ones do not, or end it with an error."""
    whole, broken = recipe(tmp_path / "whole", "minillm", **SHORT), recipe(tmp_path / "broken", "minillm", **SHORT)
    run = tmp_path / "broken/run"
    order = {"rank": rank, "how": "count", "operation": 0, "folder": str(tmp_path / "whole/run")}
    life = nursery.live(whole, order=order)
    total = max(int(number) for number in re.findall(r"operation (\d+)", life.said))
    tried, went_on, fault = range(1, total + 1, 7), 0, ledger[f"disk full at a file operation of rank {rank}"]
    for number in tried:
        shutil.rmtree(run, ignore_errors=True)
        how = ("ENOSPC", "EIO")[number % 2]
        life = nursery.live(broken, order=order | {"how": how, "operation": number, "folder": str(run)})
        note_end(fault, life.seconds, life.orphans)
        went_on += life.codes == [0, 0]
        if life.codes != [0, 0]:
            assert "distill: " in life.said or "Error" in life.said
            again = nursery.live(broken)
            fault.corrupted += again.codes != [0, 0]
            assert again.codes == [0, 0], f"{number}: {again.said[-3000:]}"
        differing = differences(run, tmp_path / "whole/run", but_checkpoints=True)
        if "the best student so far is not written" in life.said:
            differing = [name for name in differing if name != "the student"]
        fault.not_bit_exact += bool(differing)
        assert not differing, number
    assert went_on > len(tried) // 4


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk takes root")
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_too_small_is_foreseen(
    small_disk: Path, recipe: Callable, nursery: Nursery, ledger: Ledger, tmp_path: Path
) -> None:
    """Full after the checkpoint of step 4: the later ones are not begun."""
    whole = recipe(tmp_path / "whole", "minillm")
    broken = recipe(tmp_path / "broken", "minillm", run={"folder": str(small_disk / "run")})
    run, fault = small_disk / "run", ledger["disk too small for a checkpoint"]
    nursery.live(whole).must_end(0, 0)
    order = {"rank": 0, "how": "kill all", "phase": "forward", "step": 6}
    nursery.live(broken, order=order).must_end(-9, -9)
    assert newest_whole(run) == 4
    free = shutil.disk_usage(small_disk).free
    (small_disk / "filler").write_bytes(bytes(free - 400_000))
    life = nursery.live(broken)
    note_end(fault, 0.0, life.orphans)
    fault.corrupted += life.codes != [0, 0]
    assert life.codes == [0, 0], life.said[-3000:]
    assert re.search(
        r"distill: step-0000006 is not saved: it takes .* GB, the disk has .*; .*step-0000004 stays", life.said
    )
    assert newest_whole(run) == 4
    assert not note_comparison([fault], run, tmp_path / "whole/run", but_checkpoints=True)
    (small_disk / "filler").unlink()
    nursery.live(broken).must_end(0, 0)
    assert not note_comparison([fault], run, tmp_path / "whole/run")
