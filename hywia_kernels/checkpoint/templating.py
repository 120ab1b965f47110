"""Templates of the package's documents, rendered by jinja2."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from typing import Any

__all__ = ["render"]


def render(name: str, context: dict[str, Any], *, escape: Callable[[Any], str] | None = None) -> str:
    """Render the template `name` of the folder `templates` beside this file.

    Every value that the template inserts is escaped: for HTML as long as `escape` is None, else by `escape` itself,
    which returns what is marked as safe unchanged. A variable that the context lacks is an error, not an empty string.
    """
    import jinja2

    source = resources.files(__package__).joinpath("templates").joinpath(name).read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=escape is None,
        finalize=escape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.from_string(source).render(context)
