"""`opd plan`: memory, bytes and seconds of a recipe's step, computed from the configs of its models."""
