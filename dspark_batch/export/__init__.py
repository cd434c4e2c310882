"""From a recipe to an engine folder: weights, graphs, check, measure, manifest."""
