"""One file a claim of a paper, each with `run(lab) -> Outcome`."""
