"""The experiment of the paper as one command: every way to improve a model, on the same prompts and seeds."""
