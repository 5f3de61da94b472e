"""`python -m stitchvm` is the `stitchvm` command."""

from stitchvm.cli import main

if __name__ == "__main__":
    main()
