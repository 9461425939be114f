"""How much is pruned where: budgets, N:M patterns, the smallest k, what a pruned block promises."""
