"""Tables for a terminal."""

from benchmarks.tables import table


def test_the_first_column_is_to_the_left_and_figures_to_the_right() -> None:
    assert table([["a form", "x"], ["plain", "1,000"]]).splitlines() == [
        "a form      x",
        "-------------",
        "plain   1,000",
    ]
