"""The made-up world of the study of weights of digits: exact numbers, weights, and the control of the same mean."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from opd.methods.gui_sd import gui_sd
from opd_studies.claims import digit_weights as study
from opd_studies.lab.lab import Lab
from opd_studies.worlds import pointing
from opd_studies.worlds.pointing import BASE, BOX, DIGITS, NUMBERS, Digits, Kind


def test_digits_of_a_distribution_give_it_back():
    centre = torch.tensor([500, 73])
    z = pointing.around(centre, 40.0)
    weights = [math.exp(-((n - 500) ** 2) / (2 * 40.0**2)) for n in range(NUMBERS)]
    expected = [w / math.fsum(weights) for w in weights]
    torch.testing.assert_close(pointing.numbers_of(z)[0], torch.tensor(expected), atol=1e-6, rtol=1e-4)
    assert z.shape == (2, 111, BASE)


def test_exam_sums_over_all_numbers():
    given, z = pointing.made(Kind(blur=12.0), torch.Generator().manual_seed(0))
    logp, inside, error = z.log_softmax(-1).double(), 0.0, 0.0
    for x in range(len(z)):
        for n in range(NUMBERS):
            a, b, c = n // 100, n // 10 % 10, n % 10
            p = math.exp(float(logp[x, 0, a] + logp[x, 1 + a, b] + logp[x, 11 + 10 * a + b, c]))
            distance = abs(n - int(given.target[x]))
            inside, error = inside + p * (distance <= BOX) / len(z), error + p * distance / len(z)
    got = pointing.exam(z, given)
    assert got["inside"] == pytest.approx(inside, rel=1e-4)
    assert got["error"] == pytest.approx(error, rel=1e-4)


def test_prefixes_are_those_of_the_tables():
    assert pointing.prefixes_of(torch.tensor([[4, 0, 7]])).tolist() == [[0, 1 + 4, 11 + 40]]


def test_weights_are_those_of_the_method_and_level_has_their_mean():
    given, z = pointing.made(Kind(blur=12.0), torch.Generator().manual_seed(0))
    batch, _ = pointing.written(z, given, torch.Generator().manual_seed(1))
    w = gui_sd().with_tokenizer(Digits()).weight(batch)
    assert batch.teacher_entropy is not None
    certain = 1.0 - batch.teacher_entropy / math.log(BASE)
    torch.testing.assert_close(w, torch.tensor([3.0, 2.0, 1.0]) * certain)
    level = study.levelled().with_tokenizer(Digits()).weight(replace(batch))
    torch.testing.assert_close(level, torch.full_like(w, float(w.mean())))
    assert batch.mask.shape[1] == DIGITS


def test_digit_weights_study_runs_at_reduced_size(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "TUNING_SEEDS", (1000,))
    size = study.Size(seeds=(0, 1, 2), steps=2, every=1, rates=(1.0,))
    numbers = study.measure(Lab(folder=tmp_path, workers=1), size)
    assert list(numbers.best) == ["A", "B"]
    assert len(study.judge(numbers)) == 6
