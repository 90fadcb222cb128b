"""`make quality`: what eviction costs in answers and in likelihood, for every policy."""
