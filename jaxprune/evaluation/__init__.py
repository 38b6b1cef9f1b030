"""How well a pruned head, layer or model does, and how the methods compare."""
