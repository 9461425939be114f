"""Benchmarks: quality, performance (speed and memory), vision, durability. Results go to `results/`.

    python -m benchmarks.quality        perplexity of every method and of the peers, side by side
    python benchmarks/speed.py          speed and memory: the table of docs/performance.md
    python -m benchmarks.vision         IoU of the pruned sam-tiny
    python -m benchmarks.durability     what crash safety costs

Run them in the project's root. Every table, CSV file and picture is written by `reporting.py`.
"""
