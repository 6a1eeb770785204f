"""``python -m shike_core STAGE ...``."""

from shike_core.cli import main

if __name__ == "__main__":
    main()
