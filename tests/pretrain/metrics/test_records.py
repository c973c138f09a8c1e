"""Files of a record a line: what a crash left at their end is cut off in its place, anything
else is refused.
"""

import json
import subprocess
from pathlib import Path

import pytest
from support.forked_ranks import run_ranks, train_on
from support.hand_made_runs import trained_step
from support.runs import write_recipe
from support.waiting import wait_until

from data_prep.errors import UserError
from pretrain.metrics.metrics_file import MetricsFile
from pretrain.metrics.records import cut_damaged_end, cut_to_step, read_lines

DAMAGE = [
    b"\0" * 300,
    b"\0" * 300 + b"\n",
    b'{"step": 4, "lo' + b"\0" * 50 + b"\n",
    b'{"step": 4, "lo\n{"step": 5}\n',
    b"[]\n",
    b"\xff\xfe\n",
    b"[" * 100_000 + b"\n",
    b'{"step": "4"}\n',
]


def lines(*steps: int) -> bytes:
    return b"".join(json.dumps({"step": step, "loss": step / 7}).encode() + b"\n" for step in steps)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("step", [0, 2, 4])
def test_damage_behind_the_steps_of_a_checkpoint_is_cut_off_and_said(
    damage: bytes, step: int, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines(0, 1, 2, 3) + damage)
    inode = path.stat().st_ino
    file = MetricsFile(tmp_path, step)
    assert file.cut
    assert f"{path}: " in file.cut
    assert " after step 3: " in file.cut
    assert file.lacks == 0
    file.append(trained_step(step))
    file.close()
    assert [line["step"] for line in read_lines(path)] == [*range(step), step]
    assert path.stat().st_ino == inode


@pytest.mark.parametrize("damage", [damage for damage in DAMAGE if damage.endswith(b"\n")])
def test_damage_among_the_steps_of_a_checkpoint_is_refused_and_left(
    damage: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    content = lines(0, 1, 2) + damage + lines(4, 5)
    path.write_bytes(content)
    with pytest.raises(
        UserError,
        match=r"metrics\.jsonl: damaged \(line 4: .*\); mend that line, or delete it alone",
    ):
        MetricsFile(tmp_path, 4)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("content", "step", "says"),
    [
        (
            lines(0, 1) + b'{"st',
            2,
            "line 3 is torn after step 1: 4 bytes cut off; those steps are trained again",
        ),
        (
            lines(0, 1) + b'{"st',
            0,
            "line 3 is torn after step 1: 4 bytes cut off; those steps are trained again",
        ),
        (
            lines(0, 1) + b'{"st',
            5,
            "after step 1: 4 bytes cut off; the lines of 3 steps are lost; the checkpoint has",
        ),
        (
            b'{"st',
            5,
            "line 1 is torn after its beginning: 4 bytes cut off; the lines of 5 steps are lost",
        ),
    ],
)
def test_a_torn_line_is_said_to_be_trained_again_only_if_it_is(
    content: bytes, step: int, says: str, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    kept, said = cut_to_step(path, step)
    assert said
    assert says in said
    assert ("not trained again" in said) == (step == 5)
    assert path.read_bytes() == lines(*range(len(kept)))


def test_a_whole_file_is_cut_in_silence(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines(0, 1, 2, 3))
    kept, said = cut_to_step(path, 2)
    assert (len(kept), said) == (2, None)
    assert path.read_bytes() == lines(0, 1)


def test_steps_out_of_order_lose_no_step_that_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines(0, 5, 1, 2))
    file = MetricsFile(tmp_path, 3)
    file.append(trained_step(3))
    file.close()
    assert [line["step"] for line in read_lines(path)] == [0, 1, 2, 3]


@pytest.mark.parametrize("damage", [damage for damage in DAMAGE if b"\0" not in damage])
def test_of_skips_nothing_is_cut_off_that_no_crash_leaves(damage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "skips.jsonl"
    path.write_bytes(lines(3, 9) + damage)
    with pytest.raises(UserError, match=r"skips\.jsonl: damaged"):
        cut_damaged_end(path)
    assert path.read_bytes() == lines(3, 9) + damage


@pytest.mark.parametrize(
    "damage", [b'{"step": 4, "lo', *(damage for damage in DAMAGE if b"\0" in damage)]
)
def test_of_skips_an_end_that_a_crash_left_is_cut_off(damage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "skips.jsonl"
    path.write_bytes(lines(3, 9) + damage)
    records, said = cut_damaged_end(path)
    assert [record["step"] for record in records] == [3, 9]
    assert (said is not None) == damage.endswith(b"\n")  # a kill tears a line, that is no damage
    assert path.read_bytes() == lines(3, 9)
    content = lines(3) + damage + b"\n" + lines(9)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"skips\.jsonl: damaged"):
        cut_damaged_end(path)
    assert path.read_bytes() == content


def test_a_run_goes_on_over_what_a_crash_left_and_who_follows_its_metrics_does_too(
    tiny_data: Path, tmp_path: Path
) -> None:
    recipe, run_dir = (
        write_recipe(tmp_path / "tiny.yaml", train_tokens=10 * 6 * 32),
        tmp_path / "run",
    )
    train_on(1, recipe, tiny_data, run_dir, "--stop-at-step=6")
    metrics, seen = run_dir / "metrics.jsonl", tmp_path / "seen"
    whole = metrics.read_bytes()
    metrics.write_bytes(whole[:-20] + b"\0" * 20 + b"\n")
    assert run_ranks(1, recipe, tiny_data, run_dir).exit_codes == [2]  # step 5 is needed
    metrics.write_bytes(whole + b"\0" * 64 + b"\n")
    (run_dir / "skips.jsonl").write_bytes(b"\0" * 64 + b"\n")
    with seen.open("wb") as output:
        follower = subprocess.Popen(
            ["tail", "-n", "+1", "-f", str(metrics)], stdout=output, stderr=subprocess.DEVNULL
        )
    try:
        said = train_on(1, recipe, tiny_data, run_dir)
        wait_until(lambda: b'"step": 9' in seen.read_bytes(), "the last step", 30)
    finally:
        follower.kill()
        follower.wait()
    assert "metrics.jsonl: damaged (" in said
    assert "skips.jsonl: damaged at its end (" in said
    assert [line["step"] for line in read_lines(metrics)] == list(range(10))
