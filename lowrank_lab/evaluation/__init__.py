"""What is measured on a compressed model, each number with its protocol."""
