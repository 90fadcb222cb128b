"""A search for the best policy on a text of the user's: windows of it, candidates, a race, its record, what it says."""
