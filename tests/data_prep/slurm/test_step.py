"""What Slurm's variables say; with the real Slurm: tests/launch/test_srun.py."""

import pytest

from data_prep.errors import UserError
from data_prep.slurm.step import read_step, tasks_of_nodes

OF_A_STEP = {
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "n[1-3]",
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_ID": "3",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
}


@pytest.fixture(autouse=True)
def step(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in OF_A_STEP.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("text", "tasks"),
    [("4", [4]), ("2,1", [2, 1]), ("2(x2),1", [2, 2, 1]), ("8(x3),4(x2)", [8, 8, 8, 4, 4])],
)
def test_tasks_of_nodes_are_read_in_the_form_that_slurm_has_for_them(
    text: str, tasks: list[int]
) -> None:
    assert tasks_of_nodes(text) == tasks


@pytest.mark.parametrize("text", ["", "2(2)", "2(x2)1", "n[1-2]", "2,,1"])
def test_what_is_no_list_of_tasks_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"expected tasks of nodes as Slurm writes them"):
        tasks_of_nodes(text)


def test_a_task_knows_its_place() -> None:
    found = read_step()
    assert found is not None
    assert (found.task, found.tasks, found.local_task, found.local_tasks) == (4, 5, 0, 1)
    assert (found.job, found.number, found.node, found.nodes) == (17, 3, 2, "n[1-3]")


@pytest.mark.parametrize("tasks", [None, "1"])
def test_a_single_task_is_no_step_of_ranks(
    tasks: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
    if tasks is not None:
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", tasks)
    assert read_step() is None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SLURM_PROCID", None, "one of several ranks, but SLURM_PROCID is not set"),
        ("SLURM_PROCID", "x", "SLURM_PROCID=x: expected a number"),
        ("SLURM_NODEID", "3", r"says nothing of the node of SLURM_NODEID=3"),
    ],
)
def test_variables_that_do_not_fit_are_named(
    name: str, value: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(name)
    if value is not None:
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        read_step()
