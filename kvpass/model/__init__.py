"""The compiled model: the same modules as the original, entered by another door; its graphs and its limits."""
