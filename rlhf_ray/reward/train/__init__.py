"""Training reward models on human comparisons."""
