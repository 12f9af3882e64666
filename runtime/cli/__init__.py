"""The command line: ``tg-run``, and what it shares with the other commands."""
