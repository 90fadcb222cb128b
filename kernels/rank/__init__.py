"""How much each key deserves to stay, and how many slots each head gets for that. Pure torch."""
