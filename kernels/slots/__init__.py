"""How slots lie in memory, evenly or not, and how past slots and new keys become one sequence."""
