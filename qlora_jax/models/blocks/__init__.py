"""The blocks that a decoder's layers are made of."""
