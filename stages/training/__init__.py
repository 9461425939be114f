"""How a block is trained: the loss, the loop, the best weights, defaults and random order."""
