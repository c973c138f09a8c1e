"""Texts that commands print and write, from the templates of this folder, and the model card of
pretrain/hf.
"""

from pathlib import Path
from typing import Any

import jinja2

from data_prep.inputs.urls import without_credentials

WINGS = Path(__file__).parent.parent
TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader([WINGS / "view", WINGS / "hf"]), undefined=jinja2.StrictUndefined
)
TEMPLATES.filters["without_credentials"] = without_credentials


def render(name: str, **values: Any) -> str:
    """The text of a template. A value that it needs and does not get is an error."""
    return TEMPLATES.get_template(name).render(values)
