"""Make a page of one HTML file that needs no other file, out of a template and of figures."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup  # jinja2's own type of text that is HTML already

from deepvit_train.report.figure import DOTS


def render(package: str, template: str, **content: Any) -> str:
    """Return a page as HTML. What is put into it is escaped.

    Args:
        package: the package that holds the template, which extends page.html.j2 of this one.
        template: the file's name there.
        content: what the template names.
    """
    loader = ChoiceLoader([PackageLoader(package, "."), PackageLoader("deepvit_train.report", ".")])
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    return environment.get_template(template).render(**content)


def natural_width(file: Path) -> int:
    """Return the width of a figure's file, PNG or SVG as `report.figure.save` writes them, in CSS pixels."""
    if file.suffix == ".png":
        return round(int.from_bytes(file.read_bytes()[16:20]) * 96 / DOTS)
    found = re.search(r'<svg[^>]* width="([\d.]+)pt"', file.read_text())
    return round(float(found[1]) * 96 / 72) if found else 0


def inline(file: Path, description: str) -> Markup:
    """Return the content of a figure's file, PNG or SVG, as part of a page."""
    if file.suffix == ".png":
        encoded = base64.b64encode(file.read_bytes()).decode()
        return Markup('<img alt="{}" src="data:image/png;base64,{}">').format(description, encoded)
    text = file.read_text()
    label = Markup('<svg role="img" aria-label="{}" ').format(description)
    return label + Markup(text[text.index("<svg ") + len("<svg ") :])
