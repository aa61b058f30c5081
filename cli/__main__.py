"""`python -m samlite.cli`."""

from samlite.cli import main

main()
