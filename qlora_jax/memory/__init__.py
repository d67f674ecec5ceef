"""Knowing a train step's memory before there is a GPU: XLA compiles it for one that is not there."""
