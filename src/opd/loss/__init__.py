"""Records in, one scalar with its gradient out. The only place that sums or divides."""
