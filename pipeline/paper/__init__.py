"""What the paper published, and what it takes to do the same again.

Source: "Large Model Pruning with Inter-Block Error Compensation", tables 1 to 9 (`results.csv`) and Figs. 3 to 8, whose
curves are drawn and not tabled there.
"""
