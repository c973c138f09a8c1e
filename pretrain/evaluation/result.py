"""The files in which `pretrain.evaluate` leaves its figures."""

from pathlib import Path
from typing import Any

from data_prep.errors import UserError, parse_json
from pretrain.checkpoint.layout import step_name

EVALUATION_NAME = "evaluation.json"
EVALUATIONS_NAME = "evaluations"
FIGURES = ("targets", "loss", "perplexity", "bits_per_byte")  # which an export's card tells


def figures_of(run_dir: Path, step: int) -> dict[str, Any] | None:
    """What was measured after so many steps on the run's own data, if that was done.

    Raises UserError for a file that is not what this command writes.
    """
    advice = "run python -m pretrain.evaluate again, or remove it"
    for path in (run_dir / EVALUATION_NAME, run_dir / EVALUATIONS_NAME / f"{step_name(step)}.json"):
        content: Any = parse_json(path.read_bytes(), str(path), advice) if path.is_file() else {}
        if not isinstance(content, dict):
            raise UserError(f"{path}: not what pretrain.evaluate writes; {advice}")
        if content.get("step") == step:
            if not all(isinstance(content.get(name), int | float) for name in FIGURES):
                raise UserError(f"{path}: lacks figures of {', '.join(FIGURES)}; {advice}")
            return content
    return None
