"""`python -m jaxtune VERB` is `jaxtune VERB`."""

from jaxtune.cli import main

if __name__ == "__main__":
    main()
