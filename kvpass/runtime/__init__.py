"""What lives between calls: stores, their shells in the host's cache, and the compiled callable that connects them."""
