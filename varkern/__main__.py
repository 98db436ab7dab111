"""``python -m varkern``: the command line, as the installed ``varkern`` runs it."""

from varkern.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
