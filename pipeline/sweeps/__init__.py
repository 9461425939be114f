"""Many runs over a grid or a search."""
