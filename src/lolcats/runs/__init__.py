"""The folder of a run, the recipe that fills it, and what it holds."""
