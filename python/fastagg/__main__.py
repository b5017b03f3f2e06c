"""`python -m fastagg`: the command line."""

from fastagg.cli import main

main()
