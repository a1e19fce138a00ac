"""Turns that this instance owns: who may begin one, how it runs, and what the log gets of it."""
