"""The rewritten graph: kvpass ops in the place of attention, in its pure and exported forms too."""
