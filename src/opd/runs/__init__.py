"""The stages of a recipe, one after the other: prepared, checked, built, trained and exported."""
