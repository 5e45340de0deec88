"""The page of a run: one self-contained HTML file made from the workdir's files alone. Imports no jax."""
