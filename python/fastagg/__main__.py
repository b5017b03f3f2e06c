"""`python -m fastagg`: the command line."""

from fastagg.cli.entry import main

main()
