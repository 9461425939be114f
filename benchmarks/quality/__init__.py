"""Perplexity: every method and the peers on the same tokens, trials of single settings, tuning."""
