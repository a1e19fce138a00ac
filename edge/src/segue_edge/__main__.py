"""`python -m segue_edge` is `segue edge`."""

from segue_edge.cli import app

app()
