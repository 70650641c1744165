"""What dataset.json and the tables of participants say of a volume."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from scripts.data.dataset_tables import conditions_of, dataset_list_of, dataset_lists


def write(folder: Path, table: str, name: str = "participants.tsv") -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(table, encoding="utf-8")


def known(folder: Path, path: str) -> dict:
    return conditions_of(str(folder / path), str(folder))


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


def test_table_is_read_without_quoting_and_stripped(tmp_path):
    rows = [
        "\ufeffparticipant_id \t age\tnotes\tsex",
        'sub-01 \t 34\t12" disc\tF',  # unpaired, as for inches
        "sub-05\t1e1\t1_2\tF",  # a word, though not for Python
        "sub-02\tNA\tNone\tM\r",
        '"sub-03"\t"51"\t"calm"\t"F"',  # as R writes it
        "04\t60",
        "",
        "sub-NDAR-INV01\t7\t\tM\t",
        "sub-NDAR-INV02\t8\t\tF",
    ]
    write(tmp_path, "\n".join(rows))
    assert known(tmp_path, "sub-01/anat/sub-01_T1w.nii.gz") == {"age": 34, "notes": '12" disc', "sex": "F"}
    assert known(tmp_path, "sub-02.nii.gz") == {"sex": "M"}
    assert known(tmp_path, "sub-03_T1w.nii.gz") == {"age": 51, "notes": "calm", "sex": "F"}
    assert known(tmp_path, "sub-04/x.nii.gz") == {"age": 60}
    assert known(tmp_path, "sub-05/x.nii.gz") == {"age": 10, "notes": "1_2", "sex": "F"}
    assert known(tmp_path, "sub-NDAR-INV01/x.nii.gz") == {"age": 7, "sex": "M"}
    assert known(tmp_path, "sub-NDAR-INV02_T1w.nii.gz") == {"age": 8, "sex": "F"}
    assert known(tmp_path, "sub-0/x.nii.gz") == known(tmp_path, "sub-NDAR/x.nii.gz") == {}


def test_row_of_the_session_is_taken_and_ambiguous_rows_are_refused(tmp_path):
    rows = [
        "participant_id\tsession_id\tage",
        "sub-1\tses-a\t30",
        "sub-1\tb\t31",
        "sub-2\tn/a\t40",
        "sub-3\t\t50",
        "sub-3\t\t51",
    ]
    write(tmp_path, "\n".join(rows))
    assert known(tmp_path, "sub-1/ses-a/anat/x.nii") == {"age": 30}
    assert known(tmp_path, "sub-1_ses-b_T1w.nii") == {"age": 31}
    assert known(tmp_path, "sub-1/ses-c/x.nii") == {}
    assert known(tmp_path, "sub-2/ses-a/x.nii") == {"age": 40}
    for path in ("sub-1/x.nii", "sub-3/ses-a/x.nii"):
        with pytest.raises(ValueError, match=rf"participants.tsv has 2 rows that may be of .*{path}.*session_id"):
            known(tmp_path, path)
    write(tmp_path, "session_id\tage\tscore\nses-a\t33\t5\nses-b\t34\tn/a\n", "sub-2/sub-2_sessions.tsv")
    assert known(tmp_path, "sub-2/ses-a/x.nii") == {"age": 33, "score": 5}
    assert known(tmp_path, "sub-2/ses-b/x.nii") == {"age": 34}


def test_row_with_too_many_cells_is_refused(tmp_path):
    write(tmp_path, "participant_id\tage\nsub-1\t3\nsub-2\t4\t5\n")
    with pytest.raises(ValueError, match=r"participants.tsv has 3 cells in line 3, and 2 names of columns"):
        known(tmp_path, "sub-1/x.nii")


def write_lists(folder: Path, text: str) -> str:
    (folder / "dataset.json").write_text(text, encoding="utf-8")
    return str(folder)


def test_lists_with_a_byte_order_mark_and_plain_strings(tmp_path):
    folder = write_lists(tmp_path, "\ufeff" + json.dumps({"training": ["./a.nii", {"image": "b.nii", "age": 3}]}))
    paths = [str(tmp_path / name) for name in ("a.nii", "b.nii")]
    assert [item["image"] for item in dataset_lists(folder)["training"]] == paths
    assert conditions_of(paths[1], folder) == {"age": 3} and conditions_of(paths[0], folder) == {}
    assert dataset_list_of(str(tmp_path / "c.nii"), folder) == "none"


def test_dataset_json_of_nnunet_is_left_aside(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        folder = write_lists(tmp_path, '{"channel_names": {"0": "T1"}, "numTraining": 2, "file_ending": ".nii.gz"}')
        assert dataset_lists(folder) == {}
    assert "dataset.json is left aside: it has no list `training`" in caplog.text
    assert dataset_list_of(str(tmp_path / "a.nii"), folder) is None


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"training": [', "dataset.json is not JSON that can be read"),
        (
            '{"training": [{"image": ["a.nii", "b.nii"]}]}',
            "`training` in .*dataset.json has .*b.nii'. as an `image`",
        ),
        ('{"training": [{"label": "a.nii"}]}', "`training` in .* has None as an `image`"),
        ('{"training": ["a.nii"], "validation": ["./a.nii"]}', "has 1 files in both lists, such as .*a.nii"),
        ('{"training": []}', "needs a list `training` that is not empty"),
        ('{"validation": ["a.nii"]}', "needs a list `training`"),
        ('{"training": "a.nii"}', "needs a list `training`"),
    ],
)
def test_unusable_lists_are_refused_with_their_reason(tmp_path, text, words):
    with pytest.raises(ValueError, match=words):
        dataset_lists(write_lists(tmp_path, text))


def test_table_of_other_columns_is_refused(tmp_path):
    write(tmp_path, "subject,age\nsub-1,3\n")
    with pytest.raises(ValueError, match="participants.tsv has no column `participant_id`"):
        known(tmp_path, "sub-1.nii.gz")
