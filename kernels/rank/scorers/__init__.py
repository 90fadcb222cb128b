"""Scorers: what a key deserves, from geometry, observed rows or chance. One file per idea; none picks or keeps."""
