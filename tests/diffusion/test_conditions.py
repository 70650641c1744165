"""What a generator is told: numbers, words and gaps, from the files that users have."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch

from scripts.data.dataset_tables import conditions_of, dataset_list_of
from scripts.diffusion.conditions import Conditions

VALUES = [{"age": 20.0, "sex": "F"}, {"age": 30.0, "sex": "M"}, {"sex": "F"}, {"age": 40.0}]
SIZES, SPACINGS = [[16, 18, 20], [20, 18, 20]] * 2, [[1.0, 1.0, 2.0]] * 4


@pytest.fixture
def conditions() -> Conditions:
    return Conditions.learn(["age", "sex"], VALUES, SIZES, SPACINGS)


def test_numbers_are_standardised_words_are_classes_and_gaps_are_zeros(conditions):
    vectors = torch.stack([conditions.vector(*each) for each in zip(VALUES, SIZES, SPACINGS)])
    assert vectors.shape == (4, len(conditions)) == (4, 1 + 6 + 2 + 2)
    assert vectors[:, 0].tolist() == [1] * 4
    assert vectors[:, 1].tolist() == pytest.approx([-1, 1, -1, 1])
    assert not vectors[:, 2:7].any()  # the same in all volumes
    deviation = np.std([20, 30, 40])
    assert vectors[:, 7].tolist() == pytest.approx([-10 / deviation, 0, 0, 10 / deviation])
    assert vectors[:, 8].tolist() == [1, 1, 0, 1]
    assert vectors[:, 9:].tolist() == [[1, 0], [0, 1], [1, 0], [0, 0]]
    assert not conditions.nothing().any()


def test_description_is_json_and_makes_the_same_vectors(conditions):
    again = Conditions(json.loads(json.dumps(conditions.description)))
    assert torch.equal(again.vector(VALUES[0], SIZES[0], SPACINGS[0]), conditions.vector(VALUES[0], SIZES[0], SPACINGS[0]))


def test_dropout_leaves_out_all_or_single_conditions_as_often_as_it_says(conditions):
    random = np.random.default_rng(0)
    drawn = torch.stack([conditions.drawn(VALUES[0], SIZES[0], SPACINGS[0], 0.2, random) for _ in range(4000)])
    told = drawn[drawn[:, 0] == 1]
    assert len(told) / len(drawn) == pytest.approx(0.8, abs=0.02)
    assert not drawn[drawn[:, 0] == 0].any()
    assert told[:, 8].mean().item() == pytest.approx(0.8, abs=0.02)
    assert told[:, 9].mean().item() == pytest.approx(0.8, abs=0.02)
    full = conditions.vector(VALUES[0], SIZES[0], SPACINGS[0])
    assert torch.equal(conditions.drawn(VALUES[0], SIZES[0], SPACINGS[0], 0.0, random), full)


def test_what_training_did_not_see_is_refused_or_warned_of_by_name(conditions, caplog):
    assert conditions.checked({"age": 25, "sex": "F"}) == {"age": 25.0, "sex": "F"}
    assert conditions.checked({"age": None}) == {}
    for requested, words in [
        ({"height": 180}, "names 'height'; this generator was trained with the conditions age, sex"),
        ({"sex": "X"}, "sex 'X'; it must be one that training saw: F, M"),
        ({"age": "old"}, "age 'old'; it must be a number"),
        ({"age": 95}, r"age 95; training saw 20 to 40; it must be from \d+\.\d+ to \d+\.\d+,"),
    ]:
        with pytest.raises(ValueError, match=words):
            conditions.checked(requested)
    with caplog.at_level(logging.WARNING):
        assert conditions.checked({"age": 44}) == {"age": 44.0}
    assert "age 44; training saw 20 to 40" in caplog.text


def test_keys_that_no_volume_has_or_that_name_volumes_are_refused():
    with pytest.raises(ValueError, match="'weight', which no training volume has; they have age, sex"):
        Conditions.learn(["weight"], VALUES, SIZES, SPACINGS)
    named = [{"name": f"scan {i}"} for i in range(4)]
    with pytest.raises(ValueError, match="'name', which has another value for each of the 4 volumes"):
        Conditions.learn(["name"], named, SIZES, SPACINGS)


def test_a_word_among_numbers_is_refused():
    ages = [{"age": 61}, {"age": "90+"}, {"age": 61}, {}]
    with pytest.raises(ValueError, match=r"'age', which is a number in 2 volumes and a word in 1 \('90\+'\)"):
        Conditions.learn(["age"], ages, SIZES, SPACINGS)


def test_summary_says_what_was_seen_of_each_condition(conditions):
    assert conditions.summary() == ["age (20 to 40)", "sex (F in 2, M in 1)"]


def test_conditions_come_from_participants_and_dataset_json(tmp_path):
    for name in ("sub-01/anat/sub-01_T1w.nii.gz", "sub-02/anat/sub-02_T1w.nii.gz", "other/scan.nii.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    rows = ["participant_id\tage\tsex\tgroup", "sub-01\t34.5\tF\tcontrol", "sub-02\tn/a\tM\t"]
    (tmp_path / "participants.tsv").write_text("\n".join(rows))
    other, one, two = sorted(str(path) for path in tmp_path.rglob("*.nii.gz"))
    folder = str(tmp_path)
    assert conditions_of(one, folder) == {"age": 34.5, "group": "control", "sex": "F"}
    assert conditions_of(two, folder) == {"sex": "M"}
    assert conditions_of(other, folder) == {}
    assert dataset_list_of(one, folder) is None


def test_dataset_json_decides_and_tells_the_list(tmp_path):
    paths = [tmp_path / "imagesTr" / f"sub-{i}_T1w.nii.gz" for i in range(3)]
    paths[0].parent.mkdir()
    for path in paths:
        path.touch()
    (tmp_path / "participants.tsv").write_text("participant_id\tage\nsub-0\t34\n")
    item = {"image": "./imagesTr/sub-0_T1w.nii.gz", "label": "./x.nii.gz", "age": 35, "lesion": True, "notes": ["a"]}
    lists = {"training": [item], "validation": [{"image": "imagesTr/sub-1_T1w.nii.gz", "site": "n/a"}]}
    (tmp_path / "dataset.json").write_text(json.dumps(lists))
    assert conditions_of(str(paths[0]), str(tmp_path)) == {"age": 35.0, "lesion": "true"}
    assert conditions_of(str(paths[1]), str(tmp_path)) == {}
    assert [dataset_list_of(str(path), str(tmp_path)) for path in paths] == ["training", "validation", "none"]


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "sub-1.nii.gz").touch()
    (tmp_path / "participants.tsv").write_text("subject,age\nsub-1,3\n")
    with pytest.raises(ValueError, match="participants.tsv has no column `participant_id`"):
        conditions_of(str(tmp_path / "sub-1.nii.gz"), str(tmp_path))
