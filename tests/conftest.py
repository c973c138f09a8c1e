"""Who runs which tests, and the data and the run that tests of many folders look at."""

import gc
from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from support.runs import counting_dataset, text_dataset, write_recipe

# Files of long tests that share nothing dear: each test goes to whichever worker is free. Of all
# other files one worker takes the whole, so that what a module's fixture makes is made once.
APART = (
    "test_cluster.py",
    "test_exports.py",
    "test_launch.py",
    "test_pretrain_slurm.py",
    "test_signals.py",
    "test_srun.py",
    "test_supervise.py",
    "test_watch.py",
)

hypothesis.settings.register_profile("shared machine", deadline=None)
hypothesis.settings.load_profile("shared machine")


def pytest_configure(config: pytest.Config) -> None:
    """Have pytest-xdist, if that is there, take the tests in the order of
    `pytest_collection_modifyitems`.
    """
    config.option.loadscopereorder = False
    gc.disable()  # until all is imported


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For `--dist loadfile`: a file is a unit, and each test of APART is one."""
    from xdist.scheduler import LoadFileScheduling

    class LoadFileOrTest(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return nodeid if Path(file).name in APART else file

    return LoadFileOrTest(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a worker of pytest-xdist: the longest tests first, the smallest files last, so that all
    end together.
    """
    if not hasattr(config, "workerinput"):
        return
    tests_in = Counter(item.path for item in items)

    def rank(item: pytest.Item) -> tuple[bool, bool, int]:
        return "slow" not in item.keywords, item.path.name not in APART, -tests_in[item.path]

    items.sort(key=rank)


def pytest_collection_finish() -> None:
    """What was imported stays to the end: no search for garbage, of which the tests cause many,
    goes through it.
    """
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set of 512 ids."""
    return counting_dataset(tmp_path_factory.mktemp("tiny") / "dataset")


@pytest.fixture(scope="session")
def text_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small data set of real text."""
    return text_dataset(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def text_run(text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tiny recipe on real text."""
    home = tmp_path_factory.mktemp("text_run")
    from support.forked_ranks import train_on  # which imports this module

    train_on(1, write_recipe(home / "recipe.yaml"), text_data, home / "run")
    return home / "run"
