"""`python -m ridgeline` is the command `ridgeline`."""

from ridgeline.tools.cli import main

if __name__ == "__main__":
    main()
