"""Blocks of a page open to what was put in, and data in a script element cannot end it."""

import json

import numpy as np

from opd.viewer.pack import Packer, hundredths, opened, plain, script_json, slices, text_of


def test_block_opens_to_rows_and_columns():
    packer, rows = Packer(), [{"n": {}}, {"n": {}}]
    packer.add(rows[0]["n"], "p", "hundredths", np.array([-1.234, np.nan, 400.0]))
    packer.add(rows[1]["n"], "p", "hundredths", np.array([0.005]))
    packer.add(rows[1]["n"], "token", "index", [packer.token(7, "a"), packer.token(70_000, "b"), packer.token(7, "a")])
    packer.add(rows[1]["n"], "turn", "small", [0, 255])
    packer.add(rows[1]["n"], "q", "hundredths", None)
    head, columns = opened(packer.bytes({"rows": rows}))
    first, second = slices(head["rows"], columns)
    assert first["p"].tolist()[::2] == [-1.23, 327.67]
    assert np.isnan(first["p"][1])
    assert "q" not in second
    assert second["token"].tolist() == [0, 1, 0]
    assert second["turn"].tolist() == [0, 255]
    assert head["vocabulary"] == [[7, "a"], [70_000, "b"]]


def test_hundredths_are_within_half_of_one():
    values = np.random.default_rng(0).normal(0, 20, 10_000)
    assert np.abs(hundredths(values) / 100 - values).max() <= 0.005 + 1e-12
    assert hundredths(np.array([np.inf, -np.inf])).tolist() == [32767, -32767]


def test_equal_blocks_have_equal_bytes():
    assert plain({"a": 1}) == plain({"a": 1})
    assert text_of(plain({"a": "<script>"})).isascii()


def test_script_json_cannot_end_its_element():
    hostile = "</script><!--<script>\u2028\u2029&"
    text = script_json({"a": hostile})
    assert not set(text) & set("<>&\u2028\u2029")
    assert json.loads(text) == {"a": hostile}
