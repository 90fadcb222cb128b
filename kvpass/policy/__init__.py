"""Policies as data: what is observed, what is kept, what is protected. Never sees a graph."""
