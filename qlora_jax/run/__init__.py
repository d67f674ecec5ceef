"""What each command does, as Python functions that return their results: `train.train`, `compare.compare`, …"""
