"""Attentions and the caches that feed them, found in a graph, and why others were declined."""
