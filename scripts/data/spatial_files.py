"""Which files are the spatial conditions of a volume: those that its item in ``dataset.json`` names, or else those that lie
beside it."""

from __future__ import annotations

import functools
import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from monai.utils.enums import CommonKeys as Keys

from scripts.data.dataset_tables import dataset_lists
from scripts.data.file_names import is_nifti, without_ending
from scripts.data.volume_lists import EVERY_NIFTI, visible_files
from scripts.data.volume_reader import identity_of

CHANNEL = re.compile(r"_\d{4}$")  # of nnU-Net, at the end of the names of images alone
FOLDERS = {f"images{part}": f"labels{part}" for part in ("Tr", "Ts", "Val")}
Item = dict[str, Any]
logger = logging.getLogger(__name__)


def find_spatial(items: Sequence[Item], dataset_dir: str, spatial_keys: Sequence[str]) -> list[Item]:
    """
    Find the spatial conditions of volumes: the files that the item in ``dataset.json`` names. For a key that no item there
    has: the file in the volume's folder, or in the same one below ``derivatives/*``, that is called ``NAME_KEY``, or in BIDS
    has the volume's entities and the suffix ``KEY`` or ``desc-KEY``; for the key ``label`` also the file of the same name in
    ``labelsTr`` beside ``imagesTr``.

    Returns:
        Those of ``items`` that are not conditions of others, each with ``"spatial": {key: path}``; a volume may lack some.

    Raises:
        ValueError: for a key that no volume has, for two files that fit, and where nothing but conditions is left.
        FileNotFoundError: for a file that ``dataset.json`` names and that is not there.
    """
    if not spatial_keys:
        return list(items)
    listed = {os.path.realpath(image): of_item for image, of_item in _listed(dataset_dir, spatial_keys).items()}
    keys_beside = [key for key in spatial_keys if not any(key in of_item for of_item in listed.values())]
    derivatives = sorted(Path(dataset_dir).glob("derivatives/*"))
    files_in = functools.cache(lambda folder: _by_case(folder.iterdir() if folder.is_dir() else (), keys_beside))
    found = []
    for item in items:
        image = Path(item["image"])
        near = image.parent.relative_to(dataset_dir)
        folders = [image.parent, *(folder / near for folder in derivatives)]
        if near.name in FOLDERS:
            folders.append(image.parent.with_name(FOLDERS[near.name]))
        spatial = dict(listed.get(os.path.realpath(image), {}))
        for key in keys_beside:
            fitting = [files_in(folder)[folder / case][key] for folder in folders for case in _cases_of(image)]
            paths = {path for paths in fitting for path in paths} - {image}
            if paths:
                spatial[key] = _only(sorted(paths), str(image), key)
        found.append({**item, "spatial": {key: spatial[key] for key in spatial_keys if key in spatial}})
    used = {os.path.realpath(path) for item in found for path in item["spatial"].values()}
    left = [item for item in found if os.path.realpath(item["image"]) not in used]
    if found and not left:
        raise ValueError(f"every volume below {dataset_dir} is a condition of another one; name the others in `image_glob`.")
    _count([item["spatial"] for item in left], dataset_dir, spatial_keys)
    return left


def find_spatial_items(dataset_dir: str, spatial_keys: Sequence[str]) -> list[Item]:
    """
    Find spatial conditions, with volumes or without: those of the items of ``dataset.json``; or else the files that are
    called as :py:func:`find_spatial` says, those of one case together. Of a single key these are, if no file is called so,
    all NIfTI files.

    Returns:
        ``[{"name": of the case, "image": path or None, "spatial": {key: path}}, ...]``, sorted by name; names are unique.

    Raises:
        ValueError: for a key that no case has, and for two files that fit.
    """
    listed = {Path(image): of_item for image, of_item in _listed(dataset_dir, spatial_keys).items()}
    cases = listed or _cases_of_files(dataset_dir, spatial_keys)
    _count(list(cases.values()), dataset_dir, spatial_keys)
    names = {case: without_ending(case.name) for case in cases}
    if len({*names.values()}) < len(cases):
        names = {case: "_".join([*case.relative_to(dataset_dir).parts[:-1], name]) for case, name in names.items()}
    if len({*names.values()}) < len(cases):
        raise ValueError(f"{dataset_dir} has several cases of one name, their folders included; rename them.")
    return [
        {
            "name": names[case],
            "image": str(case) if listed and case.is_file() else None,
            "spatial": {key: cases[case][key] for key in spatial_keys if key in cases[case]},
        }
        for case in sorted(cases, key=lambda case: names[case])
    ]


def _count(found: Sequence[dict[str, str]], dataset_dir: str, spatial_keys: Sequence[str]) -> None:
    """Log how many volumes or cases have each condition, and refuse one that none has."""
    for key in spatial_keys:
        count = sum(key in of_volume for of_volume in found)
        if not count:
            raise ValueError(f"no volume below {dataset_dir} has the spatial condition {key!r}, such as NAME_{key}.")
        logger.info(f"{count} of {len(found)} volumes have the spatial condition {key!r}")


def _listed(dataset_dir: str, spatial_keys: Sequence[str]) -> dict[str, dict[str, str]]:
    """The files that items of ``dataset.json`` name, by the path of the volume and by key."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for item in (item for items in dataset_lists(dataset_dir).values() for item in items):
        for key in spatial_keys:
            value = item.get(key)
            if not value:
                continue
            where = f"{dataset_dir}/dataset.json has {value!r} as `{key}` of {item['image']}"
            path = os.path.normpath(Path(dataset_dir) / value) if isinstance(value, str) else ""
            if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(dataset_dir)):
                raise ValueError(f"{where}, which must be the path of one file in that folder.")
            if not os.path.exists(path):
                raise FileNotFoundError(f"{where}, which does not exist.")
            found[item["image"]][key] = path
    return dict(found)


def _cases_of_files(dataset_dir: str, spatial_keys: Sequence[str]) -> dict[Path, dict[str, str]]:
    """The files of each case by key."""
    files = [path for path in visible_files(dataset_dir, EVERY_NIFTI) if is_nifti(path.name)]
    found = _by_case(files, spatial_keys)
    if not found and len(spatial_keys) == 1:
        found = {path.with_name(without_ending(path.name)): {spatial_keys[0]: [path]} for path in files}
    return {case: {key: _only(paths, case.name, key) for key, paths in of_key.items()} for case, of_key in found.items()}


def _by_case(files: Iterable[Path], spatial_keys: Sequence[str]) -> dict[Path, dict[str, list[Path]]]:
    """Those of ``files`` that are conditions, by key; the case is called as its volume would be, in its folder."""
    found: dict[Path, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for path in files:
        for key in spatial_keys:
            case = _case(path, key)
            if case is not None and path.exists():
                found[path.parent / case][key].append(path)
    return found


def _case(file: Path, key: str) -> str | None:
    """The case whose condition a file is by its name: the name of the volume, or in BIDS its entities."""
    name = without_ending(file.name)
    if name == file.name or name.startswith("."):
        return None
    if file.parent.name in FOLDERS.values():
        return name if key == Keys.LABEL else None
    if name.endswith(f"_{key}"):
        return name.removesuffix(f"_{key}")
    entities = name.split("_")[:-1]
    return "_".join(part for part in entities if part != f"desc-{key}") if f"desc-{key}" in entities else None


def _cases_of(image: Path) -> set[str]:
    """The cases, as :py:func:`_case` names them, that a volume may be."""
    name = without_ending(image.name)
    found = {name}
    if image.parent.name in FOLDERS:
        found.add(CHANNEL.sub("", name))
    if name.startswith("sub-"):
        entities = name.split("_")[:-1]
        found |= {"_".join(entities), "_".join(part for part in entities if not part.startswith("desc-"))}
    return found


def _only(paths: Iterable[Path], case: str, key: str) -> str:
    """The path of the only file of several paths."""
    files = {identity_of(path): path for path in reversed(list(paths))}
    if len(files) > 1:
        names = " and ".join(sorted(str(path) for path in files.values()))
        raise ValueError(f"{case} has several files as {key!r}: {names}. Take one away, or write a dataset.json.")
    return str(*files.values())
