"""Plain helpers that every layer may use: errors, checks of values, paths, texts without secrets."""
