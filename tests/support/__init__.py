"""What tests share: models, runs, pairs, the doctor's subjects, a judge's server, expected numbers of studies."""
