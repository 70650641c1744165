"""Which files are the spatial conditions of a volume: those that its item in ``dataset.json`` names, or else those that lie
beside it."""

from __future__ import annotations

import functools
import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.data.dataset_tables import dataset_lists
from scripts.data.file_names import is_nifti, without_ending
from scripts.data.volume_lists import visible_files
from scripts.data.volume_reader import identity_of

__all__ = ["find_spatial", "find_spatial_items"]

LABEL = "label"  # the key of label maps, in MONAI as in the Medical Segmentation Decathlon
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

    Args:
        items: ``[{"image": path, ...}, ...]``.
        dataset_dir: folder of the volumes.
        spatial_keys: which conditions.

    Returns:
        those of ``items`` that are not conditions of others, each with ``"spatial": {key: path}``; a volume may lack some.

    Raises:
        ValueError: for a key that no volume has, for two files that fit, and where nothing but conditions is left.
        FileNotFoundError: for a file that ``dataset.json`` names and that is not there.
    """
    if not spatial_keys:
        return list(items)
    listed = _listed(dataset_dir, spatial_keys)
    derivatives, volumes_in = sorted(Path(dataset_dir).glob("derivatives/*")), functools.cache(_volumes_in)
    found = []
    for item in items:
        path = Path(item["image"])
        near = path.parent.relative_to(dataset_dir)
        folders = [path.parent, *(folder / near for folder in derivatives)]
        if near.name in FOLDERS:
            folders.append(path.parent.with_name(FOLDERS[near.name]))
        of_file = {key: _beside(path, key, map(volumes_in, folders)) for key in spatial_keys if key not in listed}
        of_item = {key: paths.get(os.path.realpath(path)) for key, paths in listed.items()}
        spatial = {key: value for key in spatial_keys if (value := {**of_file, **of_item}[key]) is not None}
        found.append({**item, "spatial": spatial})
    used = {os.path.realpath(path) for item in found for path in item["spatial"].values()}
    left = [item for item in found if os.path.realpath(item["image"]) not in used]
    if not left and found:
        raise ValueError(f"every volume below {dataset_dir} is a condition of another one; name the others in `image_glob`.")
    for key in spatial_keys:
        count = sum(key in item["spatial"] for item in left)
        if not count:
            raise ValueError(
                f"no volume below {dataset_dir} has the spatial condition {key!r}: neither dataset.json nor a file beside a "
                f"volume (NAME_{key}, or in BIDS the suffix {key} or desc-{key}) has that name."
            )
        logger.info(f"{count} of {len(left)} volumes have the spatial condition {key!r}")
    return left


def find_spatial_items(dataset_dir: str, image_glob: str, spatial_keys: Sequence[str]) -> list[Item]:
    """
    Find spatial conditions, with volumes or without: those of the items of ``dataset.json``; or else the files that are
    called as :py:func:`find_spatial` says, those of one case together. Of a single key these are, if no file is called so,
    all NIfTI files.

    Args:
        dataset_dir: folder to search.
        image_glob: pattern that files must match, relative to it, see :py:func:`scripts.data.volume_lists.find_images`.
        spatial_keys: which conditions.

    Returns:
        ``[{"name": of the case, "image": path or None, "spatial": {key: path}}, ...]``, sorted by name; names are unique.

    Raises:
        ValueError: for a key that no case has, and for two files that fit.
    """
    listed = _listed(dataset_dir, spatial_keys)
    items = _cases_of_list(dataset_dir, listed) if listed else _cases_of_files(dataset_dir, image_glob, spatial_keys)
    for key in spatial_keys:
        if not any(key in item for item in items.values()):
            raise ValueError(f"there is no spatial condition {key!r} below `dataset_dir` {dataset_dir!r}.")
    names = _names(list(items), Path(dataset_dir))
    return [
        {"name": names[case], "image": str(case) if listed and case.is_file() else None, "spatial": items[case]}
        for case in sorted(items, key=lambda case: names[case])
    ]


def _cases_of_list(dataset_dir: str, listed: Mapping[str, Mapping[str, str]]) -> dict[Path, dict[str, str | None]]:
    images = {item["image"] for items in dataset_lists(dataset_dir).values() for item in items}
    found: dict[Path, dict[str, str | None]] = {
        Path(image): {key: paths[real] for key, paths in listed.items() if real in paths}
        for image in images
        for real in [os.path.realpath(image)]
    }
    return {image: spatial for image, spatial in found.items() if spatial}


def _cases_of_files(dataset_dir: str, image_glob: str, spatial_keys: Sequence[str]) -> dict[Path, dict[str, str | None]]:
    """The files of each case by key; the case is called as its volume would be, in its folder."""
    files = [path for path in visible_files(dataset_dir, image_glob) if is_nifti(path.name)]
    found: dict[Path, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for path in files:
        for key in spatial_keys:
            case = _case(without_ending(path.name), path.parent.name, key)
            if case is not None:
                found[path.with_name(case)][key].append(path)
    if not found and len(spatial_keys) == 1:
        found = {path.with_name(without_ending(path.name)): {spatial_keys[0]: [path]} for path in files}
    return {case: {key: _only(paths, case.name, key) for key, paths in of_key.items()} for case, of_key in found.items()}


def _case(name: str, folder: str, key: str) -> str | None:
    """The case whose condition a file is, None if it is not called so."""
    if key == LABEL and folder in FOLDERS.values():
        return name
    if name.endswith(f"_{key}"):
        return name.removesuffix(f"_{key}")
    parts = name.split("_")
    return "_".join(part for part in parts[:-1] if part != f"desc-{key}") if f"desc-{key}" in parts[:-1] else None


def _names(cases: Sequence[Path], folder: Path) -> dict[Path, str]:
    """A name for each case: that of its file, or with its folders where it is not the only one."""
    short = {case: without_ending(case.name) for case in cases}
    if len(set(short.values())) == len(cases):
        return short
    long = {case: "_".join([*case.relative_to(folder).parts[:-1], name]) for case, name in short.items()}
    if len(set(long.values())) < len(cases):
        raise ValueError(f"{folder} has several cases of one name, their folders included; rename them.")
    return long


def _listed(dataset_dir: str, spatial_keys: Sequence[str]) -> dict[str, dict[str, str]]:
    """The files that ``dataset.json`` names, by the real path of the volume, for each key that it has."""
    items = [item for items in dataset_lists(dataset_dir).values() for item in items]
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for item in items:
        for key in spatial_keys:
            if item.get(key):
                found[key][os.path.realpath(item["image"])] = _file_of(item, key, Path(dataset_dir))
    return dict(found)


def _file_of(item: Item, key: str, folder: Path) -> str:
    value = item[key]
    where = f"{folder / 'dataset.json'} has {value!r} as `{key}` of {item['image']}"
    path = Path(os.path.normpath(folder / value)) if isinstance(value, str) else None
    if path is None or not _is_below(path, str(folder)):
        raise ValueError(f"{where}, which must be the path of one file in that folder.")
    if not path.exists():
        raise FileNotFoundError(f"{where}, which does not exist.")
    return str(path)


def _is_below(path: Path, folder: str) -> bool:
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))


def _beside(image: Path, key: str, volumes: Iterable[Mapping[Any, Sequence[Path]]]) -> str | None:
    """The file of a key among the volumes of several folders."""
    name = without_ending(image.name)
    asked = (f"{name}_{key}", name, CHANNEL.sub("", name), _entities(name))
    near = {path for of_folder in volumes for each in asked for path in of_folder.get(each, [])} - {image}
    return _only([path for path in sorted(near) if _fits(name, path, key)], str(image), key)


def _fits(image: str, file: Path, key: str) -> bool:
    """Whether a file is called as a condition of the image of this name is."""
    name = without_ending(file.name)
    if file.parent.name in FOLDERS.values():
        return key == LABEL and name in (image, CHANNEL.sub("", image))
    if name == f"{image}_{key}":
        return True
    if not image.startswith("sub-") or _entities(image) != _entities(name):
        return False
    *parts, suffix = name.split("_")
    described = [part for part in parts if part.startswith("desc-")]
    return f"desc-{key}" in described or (suffix == key and set(described) <= set(image.split("_")))


def _entities(name: str) -> frozenset[str]:
    """The entities of a BIDS name but ``desc``."""
    return frozenset(part for part in name.split("_")[:-1] if not part.startswith("desc-"))


def _volumes_in(folder: Path) -> dict[Any, list[Path]]:
    """The volumes in a folder, by their names and by the entities of these."""
    found: dict[Any, list[Path]] = defaultdict(list)
    for path in folder.iterdir() if folder.is_dir() else ():
        name = without_ending(path.name)
        if name != path.name and name[0] != "." and path.exists():
            found[name].append(path)
            found[_entities(name)].append(path)
    return found


def _only(paths: Sequence[Path], case: str, key: str) -> str | None:
    """The path of the only file of several paths."""
    files = {identity_of(path): path for path in reversed(paths)}
    if len(files) > 1:
        names = " and ".join(sorted(str(path) for path in files.values()))
        raise ValueError(f"{case} has several files as {key!r}: {names}. Take one away, or write a dataset.json.")
    return str(*files.values()) if files else None
