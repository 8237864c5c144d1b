"""From an outcome to a figure, a table and the page of studies."""
