"""What is trained for: log-probabilities of tokens, and the losses made of them."""
