"""The decisions that a paper makes, each a pure function of a record."""
