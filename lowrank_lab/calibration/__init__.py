"""Text, tokens, and the activation statistics gathered from them."""
