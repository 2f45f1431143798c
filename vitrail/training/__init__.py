"""From a recipe to a run: optimizers, steps, processes, and the loop around them."""
