"""Random damage to checkpoints: to their content, written again by each format's writer, and to their bytes."""

from __future__ import annotations

import copy
import io
import json
import math
import random
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import safetensors.torch
import torch
import yaml

from .hostile import ARRAYS, HEADERS, JSON_TEXTS, PICKLES, YAML_TEXTS

Files = dict[str, bytes | None]
"""Content by path; None for a file that is gone."""

VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        7,
        17,
        10**6,
        2**31 - 1,
        2**31,
        2**63,
        10**30,
        10**400,
        0.5,
        -0.0,
        1e308,
        1e-308,
    ),
    *(
        math.nan,
        math.inf,
        -math.inf,
        "",
        "x",
        "16",
        "nan",
        "topk",
        "relu",
        "../../etc/passwd",
        "a" * 10_000,
        "\0",
        "🧨",
    ),
    *("blocks.1.hook_resid_post", "blocks.99999999999999999999.hook_resid_post", "layer_norm", "owner/repository"),
    *(
        [],
        [[]],
        [1],
        [None],
        ["x"],
        [1.5, "x"],
        list(range(300)),
        {},
        {"x": 1},
        {"x": {"x": {"x": {}}}},
        [{}],
        [[1, 2], [3]],
    ),
]
KEYS = [
    *(
        "x",
        "",
        "__class__",
        "model_type",
        "dtype",
        "torch_dtype",
        "quantization_config",
        "auto_map",
        "num_labels",
        "k",
    ),
    *("attn_implementation", "architectures", "id2label", "d_in", "d_sae", "d_out", "kept_latents", "normalization"),
    *(
        "site",
        "site_out",
        "skip_connection",
        "metadata",
        "transformers_version",
        "use_cache",
        "_name_or_path",
        "gamma",
    ),
]
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.complex64),
]


def mutate(files: dict[str, bytes], dice: random.Random) -> tuple[Files, str]:
    """Damage a checkpoint.

    Args:
        files: its files by path.
        dice: the random generator that decides on the damage.

    Returns:
        The changed files, and a description of the change.
    """
    path = dice.choice(sorted(files))
    suffix = PurePosixPath(path).suffix
    ways: list[Callable[[bytes, random.Random], tuple[bytes | None, str]]] = [_bytes]
    ways += {
        ".safetensors": [_tensors_of_safetensors] * 5 + [_header] * 3,
        ".npz": [_arrays] * 5 + [_zip] * 2 + [_hostile_array],
        ".pt": [_torch] * 5 + [_zip] * 2 + [_pickle] * 3,
        ".pth": [_torch] * 5 + [_zip] * 2 + [_pickle] * 3,
        ".json": [_json] * 8 + [_json_text],
        ".yaml": [_yaml] * 8 + [_yaml_text],
    }.get(suffix, [])
    if dice.random() < 0.04:
        return _names(files, path, dice)
    way = dice.choice(ways)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            content, what = way(files[path], dice)
        except Exception:  # the format's writer refuses, for example a name or a dtype
            content, what = _bytes(files[path], dice)
    return {path: content}, f"{path}: {what}"


def _names(files: dict[str, bytes], path: str, dice: random.Random) -> tuple[Files, str]:
    """Remove, rename, exchange or add a file."""
    other = dice.choice(sorted(files))
    changed: dict[str, Files] = {
        "removed": {path: None},
        "renamed": {path: None, path + "x": files[path]},
        "in place of another": {other: files[path]},
        "exchanged": {other: files[path], path: files[other]},
        "copied beside": {str(PurePosixPath(path).with_stem("copy")): files[path]},
    }
    what = dice.choice(list(changed))
    return changed[what], f"{path} {what} ({other})"


def _bytes(content: bytes, dice: random.Random) -> tuple[bytes, str]:
    """Cut, flip, insert, remove or repeat bytes, mostly near the ends, where headers are."""
    data, size = bytearray(content), len(content)
    if not size:
        return b"\0", "a byte"
    near = dice.choice([64, 512, 4096, size])
    at = dice.choice([dice.randrange(min(near, size)), size - 1 - dice.randrange(min(near, size))])
    length = dice.choice([1, 2, 8, 64, 1024])
    what = dice.choice(["cut", "flip", "insert", "remove", "zero", "ones", "repeat", "empty", "append"])
    match what:
        case "cut":
            del data[at:]
        case "flip":
            for _ in range(dice.choice([1, 1, 4, 30])):
                data[(at + dice.randrange(length)) % size] ^= 1 << dice.randrange(8)
        case "insert":
            data[at:at] = dice.randbytes(length)
        case "remove":
            del data[at : at + length]
        case "zero":
            data[at : at + length] = bytes(min(length, size - at))
        case "ones":
            data[at : at + length] = b"\xff" * min(length, size - at)
        case "repeat":
            data[at:at] = data[at : at + length]
        case "empty":
            data.clear()
        case "append":
            data += dice.randbytes(length)
    return bytes(data), f"bytes {what} at {at}, {length}"


# ------------------------------------------------------------------ descriptions


def _places(tree: Any, most: int = 400) -> list[tuple[Any, Any]]:
    """Return every container and key of a tree."""
    found, waiting = [], [tree]
    while waiting and len(found) < most:
        node = waiting.pop()
        keys = list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, list) else []
        found += [(node, key) for key in keys]
        waiting += [node[key] for key in keys]
    return found


def _edit(tree: Any, dice: random.Random) -> tuple[Any, str]:
    """Change a tree of plain values at one or two places."""
    tree, done = copy.deepcopy(tree), []
    for _ in range(dice.choice([1, 1, 1, 2, 3])):
        places = _places(tree)
        if not places:
            return dice.choice(VALUES), "replaced"
        node, key = dice.choice(places)
        match dice.choice(["value", "value", "value", "remove", "rename", "add", "exchange", "wrap", "near"]):
            case "value":
                node[key] = dice.choice(VALUES)
            case "remove":
                del node[key]
            case "rename" if isinstance(node, dict):
                node[str(key) + "x"] = node.pop(key)
            case "add" if isinstance(node, dict):
                node[dice.choice(KEYS)] = dice.choice(VALUES)
            case "exchange":
                other = dice.choice(places)
                if other[1] in other[0] if isinstance(other[0], dict) else other[1] < len(other[0]):
                    node[key], other[0][other[1]] = copy.deepcopy(other[0][other[1]]), copy.deepcopy(node[key])
            case "wrap":
                node[key] = dice.choice([[node[key]], {"x": node[key]}, str(node[key])])
            case "near" if isinstance(node[key], (int, float)) and not isinstance(node[key], bool):
                node[key] = dice.choice([node[key] + 1, node[key] - 1, -node[key], node[key] * 2, float(node[key])])
        done.append(f"{key!r:.40}: {node.get(key, 'gone')!r:.60}" if isinstance(node, dict) else f"[{key}]")
    return tree, ", ".join(done)


def _json(content: bytes, dice: random.Random) -> tuple[bytes, str]:
    tree, what = _edit(json.loads(content), dice)
    return json.dumps(tree).encode(), what


def _json_text(content: bytes, dice: random.Random) -> tuple[bytes, str]:
    name = dice.choice(sorted(JSON_TEXTS))
    return JSON_TEXTS[name], name


def _yaml(content: bytes, dice: random.Random) -> tuple[bytes, str]:
    tree, what = _edit(yaml.safe_load(content), dice)
    try:
        return yaml.safe_dump(tree, allow_unicode=True).encode(), what
    except ValueError:  # too many digits
        return b"k: 0x" + b"f" * 5000, "number of many digits"


def _yaml_text(content: bytes, dice: random.Random) -> tuple[bytes, str]:
    name = dice.choice(sorted(YAML_TEXTS))
    return YAML_TEXTS[name], name


# ------------------------------------------------------------------ tensors


def _change(tensors: dict[str, torch.Tensor], dice: random.Random) -> str:
    """Change one tensor, or the names."""
    if not tensors:
        tensors["x"] = torch.zeros(2)
        return "x added"
    name, other = dice.choice(sorted(tensors)), dice.choice(sorted(tensors))
    value, what = tensors[name], dice.choice(_CHANGES)
    match what:
        case "exchange":
            tensors[name], tensors[other] = tensors[other], value
        case "remove":
            del tensors[name]
        case "rename":
            tensors[dice.choice(["x", "", name.upper(), f"{name}.x", "a/b", "..", "W_skip", "log_k"])] = tensors.pop(
                name
            )
        case "add":
            tensors[dice.choice(["x", "W_skip", "b_skip", "r_mag", "scaling_factor", "k", "W_dec2"])] = value.clone()
        case "transpose":
            tensors[name] = (
                value.mT.contiguous() if value.ndim > 1 else value[:, None].clone() if value.ndim else value
            )
        case "rows":
            tensors[name] = value[: dice.choice([0, 1, 2])].clone() if value.ndim else value
        case "columns":
            tensors[name] = value[..., : dice.choice([0, 1, 2])].clone() if value.ndim else value
        case "longer":
            tensors[name] = torch.cat([value, value[:1]]) if value.ndim else value[None].repeat(3)
        case "axis":
            tensors[name] = value[None].clone()
        case "flat":
            tensors[name] = value.reshape(-1).clone()
        case "scalar":
            tensors[name] = value.reshape(-1)[:1].sum()
        case "shape":
            tensors[name] = torch.zeros(
                dice.choice([(), (0,), (1,), (3,), (0, 6), (6, 0), (5, 7), (2, 3, 4), (1,) * 7])
            )
        case "dtype":
            tensors[name] = value.to(dice.choice(DTYPES))
        case "value":
            changed = value.clone().reshape(-1)
            if len(changed) and changed.is_floating_point():
                changed[dice.randrange(len(changed))] = dice.choice([math.nan, math.inf, -math.inf, 1e38, -1e-40, 0.0])
            tensors[name] = changed.reshape(value.shape)
        case "large":
            tensors[name] = value.double() * 1e300
        case "zero":
            tensors[name] = torch.zeros_like(value)
        case "negative":
            tensors[name] = -value.double()
    return f"{name[:40]} {what}"


_CHANGES = [
    *("exchange", "remove", "rename", "add", "transpose", "rows", "columns", "longer", "axis", "flat", "scalar"),
    *("shape", "dtype", "dtype", "value", "large", "zero", "negative"),
]


def _tensors_of_safetensors(content: bytes, dice: random.Random) -> tuple[bytes, str]:
    tensors = safetensors.torch.load(content)
    what = _change(tensors, dice)
    return safetensors.torch.save({name: value.contiguous().clone() for name, value in tensors.items()}), what


def _header(content: bytes, dice: random.Random) -> tuple[bytes, str]:
    """Edit the header of a safetensors file as JSON, or put a hostile one in its place."""
    if dice.random() < 0.3:
        name = dice.choice(sorted(HEADERS))
        return HEADERS[name], name
    length = int.from_bytes(content[:8], "little")
    header, what = _edit(json.loads(content[8 : 8 + length]), dice)
    text = json.dumps(header).encode()
    announced = dice.choice([len(text)] * 8 + [len(text) + 1, len(text) - 1, 2**40])
    return struct.pack("<Q", announced) + text + content[8 + length :], f"header {what}"


def _arrays(content: bytes, dice: random.Random) -> tuple[bytes, str]:
    with np.load(io.BytesIO(content)) as opened:
        tensors = {name: torch.from_numpy(opened[name]) for name in opened.files}
    what, written = _change(tensors, dice), io.BytesIO()
    arrays: dict[str, Any] = {}
    for name, value in tensors.items():
        half = value.dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
        arrays[name or "x"] = (value.half() if half else value).numpy()
    order = dice.choice(["C", "C", "F", ">"])
    arrays = {n: np.asfortranarray(a) if order == "F" else a for n, a in arrays.items()}
    if order == ">":
        arrays = {n: a.astype(a.dtype.newbyteorder(">")) for n, a in arrays.items()}
    (np.savez_compressed if dice.random() < 0.3 else np.savez)(written, **arrays)
    return written.getvalue(), f"{what}, {order}"


def _hostile_array(content: bytes, dice: random.Random) -> tuple[bytes, str]:
    name = dice.choice(sorted(ARRAYS))
    entries = _entries(content)
    entries[dice.choice(sorted(entries))] = ARRAYS[name]
    return _zipped(list(entries.items())), name


def _torch(content: bytes, dice: random.Random) -> tuple[bytes, str]:
    """Change tensors and plain values of a file saved by torch, at any depth."""
    tree = torch.load(io.BytesIO(content), weights_only=True)
    holders = [node for node, key in _places({"": tree}) if isinstance(node, dict)]
    holders = [h for n, h in enumerate(holders) if all(h is not seen for seen in holders[:n]) and "" not in h] or [
        tree
    ]
    holder = dice.choice(holders)
    tensors = {name: value for name, value in holder.items() if isinstance(value, torch.Tensor)}
    plain = [name for name, value in holder.items() if not isinstance(value, torch.Tensor)]
    if plain and (dice.random() < 0.4 or not tensors):
        name = dice.choice(plain)
        holder[name] = value = dice.choice([*VALUES, torch.zeros(3)])
        what = f"{name!r:.40} = {value!r:.40}"
    else:
        names = list(tensors)
        what = _change(tensors, dice)
        for name in names:
            del holder[name]
        holder.update(tensors)
    if dice.random() < 0.15:
        name = dice.choice(sorted(map(str, tensors)) or [""])
        if name in holder and holder[name].ndim:
            holder[name] = (
                holder[name].expand(3, *holder[name].shape) if dice.random() < 0.5 else holder[name][..., ::2]
            )
            what += f", strides of {name[:40]}"
    written = io.BytesIO()
    torch.save(
        dice.choice([tree] * 12 + [[tree], {"x": tree}, None]),
        written,
        _use_new_zipfile_serialization=dice.random() < 0.95,
    )
    return written.getvalue(), what


def _pickle(content: bytes, dice: random.Random) -> tuple[bytes, str]:
    """Replace the pickle by a hostile one, or damage its bytes; checksums are right."""
    entries = _entries(content)
    name = next(name for name in entries if name.endswith("data.pkl"))
    if dice.random() < 0.3:
        kind = dice.choice(sorted(PICKLES))
        entries[name] = PICKLES[kind]
    else:
        entries[name], kind = _bytes(entries[name], dice)
    return _zipped(list(entries.items())), f"pickle {kind}"


def _entries(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as opened:
        return {entry.filename: opened.read(entry) for entry in opened.infolist()}


def _zipped(entries: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", method) as opened:
        for name, content in entries:
            opened.writestr(name, content)
    return written.getvalue()


def _zip(content: bytes, dice: random.Random) -> tuple[bytes, str]:
    """Rearrange the archive."""
    entries = list(_entries(content).items())
    at, what = (
        dice.randrange(len(entries)),
        dice.choice(["method", "twice", "traversal", "removed", "bytes", "bomb", "many"]),
    )
    name, value = entries[at]
    method = zipfile.ZIP_STORED
    match what:
        case "method":
            method = dice.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
        case "twice":
            entries.insert(dice.randrange(len(entries) + 1), (name, value[::-1]))
        case "traversal":
            entries[at] = (dice.choice(["../../../x", "/absolute/x", "..\\x", "x/" * 50, "\0", "", name + "/"]), value)
        case "removed":
            del entries[at]
        case "bytes":
            entries[at] = (name, _bytes(value, dice)[0])
        case "bomb":
            entries[at], method = (name, value + bytes(dice.choice([10**5, 10**7]))), zipfile.ZIP_DEFLATED
        case "many":
            entries += [(f"{name}{n}", b"") for n in range(300)]
    return _zipped(entries, method), f"archive {what} {name[:40]}"


def files_of(root: Path) -> dict[str, bytes]:
    """Return the content of a folder by path."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
