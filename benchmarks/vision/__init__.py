"""Segment Anything: IoU by method and sparsity, and the real SAM-B architecture."""
