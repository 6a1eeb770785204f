"""What the pages for people share: their template, their colours, how figures are drawn.

A page is one HTML file without network or scripts; a figure comes twice, for light and dark.
"""

import base64
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from shike_core.files import atomic_write

if TYPE_CHECKING:  # half a second that pages without figures can do without
    from matplotlib.figure import Figure

GROUP_COLOURS = {"many_shot": "#3b82c4", "medium_shot": "#e69f00", "few_shot": "#d1495b"}
_PAPER = {False: "#ffffff", True: "#1b2027"}  # the same as the page's cards
_INK = {False: "#22272e", True: "#d5dae0"}
_FAINT = {False: "#d5dae0", True: "#3d444d"}


def write_page(template: str, path: Path, /, **values: Any) -> None:
    """Render a template and write the page.

    Args:
        template: its file in ``templates/``.
        path: the HTML file.
        values: what the template names.

    Raises:
        ArtifactError: the file cannot be written.
    """
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"percent": percent, "group_name": group_name}
    page = templates.get_template(template).render(**values)
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def drawn(draw: Callable[["Figure"], None], dark: bool = False) -> bytes:
    """A figure as a PNG file.

    Args:
        draw: fills the figure, and may change its size.
        dark: light ink on dark paper.
    """
    import matplotlib
    from matplotlib.figure import Figure

    paper, ink, faint = _PAPER[dark], _INK[dark], _FAINT[dark]
    theme: Any = {
        "figure.facecolor": paper, "axes.facecolor": paper, "text.color": ink,
        "axes.labelcolor": ink, "xtick.color": ink, "ytick.color": ink, "axes.edgecolor": faint,
        "grid.color": faint, "axes.axisbelow": True, "font.size": 11, "legend.frameon": False,
        "axes.spines.top": False, "axes.spines.right": False,
        "text.parse_math": False,  # a dollar sign in the name of a class starts no formula
    }  # fmt: skip
    with matplotlib.rc_context(theme), warnings.catch_warnings():
        # The font need not have every script that class names are written in.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(4.6, 3.7), dpi=180, layout="constrained")
        draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def data_uri(png: bytes) -> str:
    """A PNG file as the address of an image in the page itself."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def worst_classes(per_class: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The tested classes of a report, the least accurate first; of equals the smaller one."""
    tested = [row for row in per_class if row["accuracy"] is not None]
    return sorted(tested, key=lambda row: (row["accuracy"], row["train_images"]))


def percent(fraction: float, digits: int = 1) -> str:
    """A fraction as a percentage without its sign."""
    return f"{100 * fraction:.{digits}f}"


def group_name(group: str) -> str:
    """What a shot group is called on a page; a class keeps its name."""
    return group.replace("_", "-").capitalize() if group in GROUP_COLOURS else group
