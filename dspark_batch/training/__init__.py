"""Train a draft against a frozen target; the only package that may import torch."""
