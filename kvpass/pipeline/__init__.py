"""One captured graph through all stages to compiled code, and the inner compilers."""
