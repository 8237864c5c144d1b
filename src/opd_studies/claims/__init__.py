"""One file per study of a paper's claims, each with `run(lab) -> Outcome`."""
