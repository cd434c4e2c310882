"""Planning for hardware that is not here: recorded rounds replayed against a cost model."""
