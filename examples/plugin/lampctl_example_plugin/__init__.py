"""A pruner and a metric for lampctl, each one class in one file."""
