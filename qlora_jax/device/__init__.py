"""What the device offers, and what programs and arrays take of it."""
