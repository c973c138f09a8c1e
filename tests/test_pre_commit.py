"""What runs before a commit is what CI runs."""

import re
from typing import Any

import yaml
from support.runs import REPOSITORY


def hooks() -> dict[str, dict[str, Any]]:
    """The hooks of the configuration, by their names."""
    content = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    return {hook["id"]: hook for repository in content["repos"] for hook in repository["hooks"]}


def test_tools_have_the_versions_of_the_constraints() -> None:
    constraints = (REPOSITORY / ".ci" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [
        requirement
        for hook in hooks().values()
        for requirement in hook.get("additional_dependencies", [])
    ]
    assert len(pinned) == 2
    assert not set(pinned) - set(constraints)


def test_shellcheck_sees_the_scripts_that_ci_shows_it() -> None:
    hook = hooks()["shellcheck"]
    typed = re.search(
        r"^ *(shellcheck .*)$", (REPOSITORY / "launch" / "test.sh").read_text(), re.MULTILINE
    )
    assert typed
    command, *patterns = typed[1].split(" launch/", 1)
    assert hook["entry"] == command
    shown = [
        path for pattern in f"launch/{patterns[0]}".split() for path in REPOSITORY.glob(pattern)
    ]
    assert len(shown) > 5
    for path in shown:
        assert re.search(hook["files"], path.relative_to(REPOSITORY).as_posix())
