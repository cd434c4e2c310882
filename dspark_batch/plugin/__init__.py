"""The verification op: one contract, a body per runtime."""
