"""The closed-form solver, its spectra, and the factorized layers made from them."""
