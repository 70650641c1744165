"""Conditions of a generator: numbers, words and gaps, from the files that users have."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict

import numpy as np
import pytest
import torch

from scripts.bundle.json_files import checked
from scripts.diffusion.conditions import Conditions, Volume

VALUES = [{"age": 20.0, "sex": "F"}, {"age": 30.0, "sex": "M"}, {"sex": "F"}, {"age": 40.0}]
SIZES = [[16, 18, 20], [20, 18, 20]] * 2


def volumes(values: list[dict]) -> list[Volume]:
    return [Volume(size, [1.0, 1.0, 2.0], known) for size, known in zip(SIZES, values)]


@pytest.fixture
def conditions() -> Conditions:
    return Conditions.learn(["age", "sex"], volumes(VALUES))


def test_numbers_are_standardised_words_are_classes_and_gaps_are_zeros(conditions):
    vectors = torch.stack([conditions.vector(volume) for volume in volumes(VALUES)])
    assert vectors.shape == (4, len(conditions)) == (4, 1 + 6 + 2 + 2)
    assert vectors[:, 0].tolist() == [1] * 4
    assert vectors[:, 1].tolist() == pytest.approx([-1, 1, -1, 1])
    assert not vectors[:, 2:7].any()  # the same in all volumes
    deviation = np.std([20, 30, 40])
    assert vectors[:, 7].tolist() == pytest.approx([-10 / deviation, 0, 0, 10 / deviation])
    assert vectors[:, 8].tolist() == [1, 1, 0, 1]
    assert vectors[:, 9:].tolist() == [[1, 0], [0, 1], [1, 0], [0, 0]]


def test_conditions_are_stored_as_json_that_makes_the_same_vectors(conditions):
    again = checked(json.loads(json.dumps(asdict(conditions))), Conditions)
    assert again == conditions and torch.equal(again.vector(volumes(VALUES)[0]), conditions.vector(volumes(VALUES)[0]))


def test_dropout_leaves_out_all_or_single_conditions_as_often_as_it_says(conditions):
    random = np.random.default_rng(0)
    volume = volumes(VALUES)[0]
    drawn = torch.stack([conditions.with_dropout(volume, 0.2, random) for _ in range(4000)])
    cond = drawn[drawn[:, 0] == 1]
    assert len(cond) / len(drawn) == pytest.approx(0.8, abs=0.02)
    assert not drawn[drawn[:, 0] == 0].any()
    assert cond[:, 8].mean().item() == pytest.approx(0.8, abs=0.02)
    assert cond[:, 9].mean().item() == pytest.approx(0.8, abs=0.02)
    assert torch.equal(conditions.with_dropout(volume, 0.0, random), conditions.vector(volume))


def test_what_training_did_not_see_is_refused_or_warned_of_by_name(conditions, caplog):
    assert conditions.checked({"age": 25, "sex": "F"}) == {"age": 25.0, "sex": "F"}
    assert conditions.checked({"age": None}) == {}
    for requested, words in [
        ({"height": 180}, "names 'height'; this generator was trained with the conditions age, sex"),
        ({"sex": "X"}, "sex 'X'; training saw F, M"),
        ({"age": "old"}, "age 'old'; it must be a number"),
        ({"age": 95}, "age 95; training saw 20 to 40, and at most"),
    ]:
        with pytest.raises(ValueError, match=words):
            conditions.checked(requested)
    with caplog.at_level(logging.WARNING):
        assert conditions.checked({"age": 44}) == {"age": 44.0}
    assert "age 44; training saw 20 to 40" in caplog.text


def test_keys_that_no_volume_has_or_that_name_volumes_are_refused():
    with pytest.raises(ValueError, match="'weight', which no training latent has; they have age, sex"):
        Conditions.learn(["weight"], volumes(VALUES))
    named = [{"name": f"scan {i}"} for i in range(4)]
    with pytest.raises(ValueError, match="'name', which names volumes"):
        Conditions.learn(["name"], volumes(named))


def test_a_word_among_numbers_is_refused():
    ages = [{"age": 61}, {"age": "90+"}, {"age": 61}, {}]
    with pytest.raises(ValueError, match=r"'age' is a number in 2 volumes and a word in 1 \('90\+'\)"):
        Conditions.learn(["age"], volumes(ages))


def test_summary_says_what_was_seen_of_each_condition(conditions):
    assert conditions.summary() == ["age (20 to 40)", "sex (F in 2, M in 1)"]
