"""What the pages share."""

import io

import pytest
from PIL import Image

from shike_core.errors import ArtifactError
from shike_core.pages import data_uri, drawn, group_name, percent, write_page


def test_a_figure_is_a_picture_on_the_paper_of_its_page() -> None:
    def draw(figure) -> None:
        figure.text(0.5, 0.5, "$x_1$ \N{SNOWMAN}\N{CJK UNIFIED IDEOGRAPH-4E00}")

    corners = [
        Image.open(io.BytesIO(drawn(draw, dark))).convert("RGB").getpixel((2, 2))
        for dark in (False, True)
    ]
    assert corners == [(255, 255, 255), (0x1B, 0x20, 0x27)]
    assert data_uri(b"abc") == "data:image/png;base64,YWJj"


def test_numbers_and_names() -> None:
    assert (percent(0.1234), percent(0.1234, 2), percent(1)) == ("12.3", "12.34", "100.0")
    assert (group_name("few_shot"), group_name("few_words")) == ("Few-shot", "few_words")


def test_a_page_that_cannot_be_written(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="not a directory"):
        write_page("page.css", tmp_path / "file" / "page.html")
