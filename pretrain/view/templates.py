"""Texts that commands print and write, from templates.

They lie in this folder, the model card's in pretrain/hf, the report's in pretrain/reporting, those
of a comparison in pretrain/comparing.
"""

from pathlib import Path
from typing import Any

import jinja2

from data_prep.inputs.urls import without_credentials

WINGS = Path(__file__).parent.parent
TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(
        [WINGS / wing for wing in ("view", "hf", "reporting", "comparing")]
    ),
    undefined=jinja2.StrictUndefined,
    # Of a page alone: what a run or a text brings in is shown as text, never obeyed.
    autoescape=jinja2.select_autoescape(["html.jinja"], default_for_string=False),
)
TEMPLATES.filters["without_credentials"] = without_credentials


def render(name: str, **values: Any) -> str:
    """The text of a template. A value that it needs and does not get is an error."""
    return TEMPLATES.get_template(name).render(values)
