"""What a rewritten graph must satisfy, and each site against the unmodified attention."""
