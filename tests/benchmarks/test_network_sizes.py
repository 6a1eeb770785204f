"""The table of sizes against published figures, and as the documents have it."""

from pathlib import Path

from benchmarks.network_sizes import main

METHOD = Path(__file__).parents[2] / "docs" / "method.md"


def test_the_table_in_the_documents_is_what_the_command_prints(capsys) -> None:
    assert main([]) == 0
    table = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    imagenet = next(row for row in rows if row[0] == "imagenet-lt")
    assert imagenet[1:5] == ["resnet50", "1000", "25.56", "4.089"]
    cifar = next(row for row in rows if row[0] == "cifar100-lt")
    assert cifar[5:] == ["1.28", "1.26", "0.120"]
    assert table in METHOD.read_text()
