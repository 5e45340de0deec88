"""Configs that can be run: each is a Python file with `get_config()`; its command, time and expected result stand on top."""
