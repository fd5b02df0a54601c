"""Low rank: the closed-form solver, the answers of a method, and the factors that follow from them."""
