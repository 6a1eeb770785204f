"""``python -m components``: the steps as commands, those that need the tracking server too."""

from components.cli import main

main()
