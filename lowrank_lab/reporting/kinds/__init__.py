"""How each kind of measurement is tabled. One file a kind."""
