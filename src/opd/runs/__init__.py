"""The run of a recipe: its stages are prepared, checked, built, trained and exported."""
