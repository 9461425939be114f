"""Numbers of the paper, and runs that reproduce them.

Source: "Large Model Pruning with Inter-Block Error Compensation", tables 1 to 9 (`results.csv`) and Figs. 3 to 8, for
which the paper has no tables.
"""
