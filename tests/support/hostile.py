"""Content that is made to harm its reader: it runs code, never ends, fills the memory, or lies about its size."""

from __future__ import annotations

import io
import struct
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

CANARY = Path(tempfile.gettempdir()) / "hf_gated_sae_canary"
"""The file that hostile code would write."""

MANY = 300_000


def text(value: str) -> bytes:
    """Return the pickle instruction that pushes a string."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def doubled(first: bytes, levels: int = 60) -> bytes:
    """Return pickle instructions for nested pairs of the same tuple: 2**levels values in a few bytes."""
    return first + b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(levels))


def storage(key: str = "0", count: int = 6, kind: str = "FloatStorage") -> bytes:
    """Return pickle instructions for a storage."""
    name = f"ctorch\n{kind}\n".encode()
    return b"(" + text("storage") + name + text(key) + text("cpu") + b"J" + struct.pack("<i", count) + b"tQ"


def tensor(
    shape: bytes = b"K\x02K\x03\x86", strides: bytes = b"K\x03K\x01\x86", offset: bytes = b"K\0", **of: object
) -> bytes:
    """Return pickle instructions for a tensor."""
    made = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(**of) + offset + shape + strides  # type: ignore[arg-type]
    return made + b"\x89ccollections\nOrderedDict\n)RtR"


def described(value: bytes, key: bytes = b"") -> bytes:
    """Return a pickle of a dictionary with one entry."""
    return b"\x80\x02}" + (key or text("a")) + value + b"s."


CODE = b"cposix\nsystem\n(" + text(f"touch {CANARY}") + b"tR"

PICKLES: Mapping[str, bytes] = {
    "runs a command": described(CODE),
    "evaluates a text": described(b"cbuiltins\neval\n(" + text(f"open({str(CANARY)!r}, 'w')") + b"tR"),
    "runs a command by an old instruction": b"\x80\x02(" + text(f"touch {CANARY}") + b"iposix\nsystem\n.",
    "imports through a dotted name": described(b"\x8c\x02os\x8c\x06system\x93" + text("true") + b"\x85R"),
    "memo of any size": b"\x80\x02}r\xff\xff\xff\x7f.",
    "memo of any size in text": b"\x80\x02}p99999999999\n.",
    "deep tuple as a key": described(b"K\1", b")" + b"\x85" * MANY),
    "deep list": b"\x80\x02" + b"]" * MANY + b"a" * (MANY - 1) + b".",
    "deep dictionary": b"\x80\x02}" + (text("a") + b"}") * 5000 + b"s" * 5000 + b".",
    "endless hash": described(b"K\1", doubled(b")")),
    "endless text of a device": described(b"ctorch\ndevice\n" + doubled(b")") + b"\x85R"),
    "endless key of a nested one": described(b"}" + doubled(b")") + b"K\1s"),
    "endless storage": described(
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + doubled(b")") + text("cpu") + b"K\6tQ"
    ),
    "endless value": described(doubled(b")")),
    "endless ordered dictionary": described(b"ccollections\nOrderedDict\n]" + doubled(b")") + b"K\1\x86a\x85R"),
    "holds itself": b"\x80\x02}q\0" + text("a") + b"h\0s.",
    "text without end": b"\x80\x02}X\xff\xff\xff\x7fabc.",
    "bytes without end": b"\x80\x05}\x96" + struct.pack("<Q", 1 << 45) + b".",
    "frame without end": b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"}.",
    "huge number": described(b"\x8b" + struct.pack("<i", 100_000) + b"\x7f" * 100_000),
    "state of a tensor": described(tensor() + b"}" + text("offset") + b"J\xff\xff\xff\x7fsb"),
    "state of a class": described(b"ccollections\nOrderedDict\n}" + text("x") + b"K\1sb"),
    "a class and no tensor": described(b"ctorch\nFloatStorage\n"),
    "longer than its storage": described(tensor(shape=b"J\0\0\0\x40K\x03\x86")),
    "storage longer than its entry": described(tensor(count=2_000_000_000)),
    "storage of negative length": described(tensor(count=-6)),
    "behind its storage": described(tensor(offset=b"J\xff\xff\xff\x7f")),
    "before its storage": described(tensor(offset=b"J\xff\xff\xff\xff")),
    "steps of 0": described(tensor(strides=b"K\0K\0\x86")),
    "overlapping steps": described(tensor(strides=b"K\1K\1\x86")),
    "steps backwards": described(tensor(strides=b"J\xff\xff\xff\xffK\1\x86")),
    "shape of many axes": described(
        tensor(shape=b"(" + b"K\1" * 100_000 + b"t", strides=b"(" + b"K\1" * 100_000 + b"t")
    ),
    "empty with an enormous side": described(tensor(shape=b"\x8a\x09" + b"\xff" * 8 + b"\0K\0\x86")),
    "shape that is no tuple": described(tensor(shape=text("23"))),
    "storage of another type": described(tensor(kind="ComplexFloatStorage")),
    "unknown storage": described(tensor(key="../../etc/passwd")),
    "a number": b"\x80\x02K\1.",
    "nothing": b"",
    "no end": b"\x80\x02}",
}


def archive(entries: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """Return a zip archive."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as opened:
        for name, content in entries.items():
            opened.writestr(name, content)
    return stream.getvalue()


def torch_file(pickled: bytes, **more: bytes) -> bytes:
    """Return a torch file with a pickle and one storage of six values."""
    return archive({"archive/data.pkl": pickled, "archive/data/0": bytes(24), "archive/version": b"3\n", **more})


def npy(shape: str = "(2, 3)", descr: str = "'<f4'", more: str = "", values: bytes = bytes(24)) -> bytes:
    """Return a .npy file with the given values in its header."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}{more}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) & 0xFFFF) + header + values


ARRAYS: Mapping[str, bytes] = {
    "objects": npy(descr="'|O'"),
    "records": npy(descr="[('a', '<f4')]"),
    "complex": npy(descr="'<c8'", values=bytes(48)),
    "big-endian": npy(descr="'>f4'"),
    "negative shape": npy(shape="(-2, -3)"),
    "enormous shape": npy(shape="(99999999999999999999, 0)"),
    "too long": npy(shape="(3000, 3000)"),
    "many axes": npy(shape="(" + "1," * 800 + ")"),
    "fractions": npy(shape="(2.0, 3)"),
    "nested": npy(shape="(" * 900 + ")" * 900),
    "code": npy(shape=f"__import__('os').system('touch {CANARY}')"),
    "open bracket": npy(shape="("),
    "no version": b"\x93NUMPY\x09\x09" + bytes(100),
    "no header": b"\x93NUMPY",
    "text": b"hello",
    "nothing": b"",
}


def safetensors(header: bytes, values: bytes = bytes(24), length: int | None = None) -> bytes:
    """Return a safetensors file with any header, and any stated length of it."""
    return struct.pack("<Q", len(header) if length is None else length) + header + values


def _entry(dtype: str = '"F32"', shape: str = "[2, 3]", place: str = "[0, 24]") -> bytes:
    return f'{{"a": {{"dtype": {dtype}, "shape": {shape}, "data_offsets": {place}}}}}'.encode()


HEADERS: Mapping[str, bytes] = {
    "longest length": safetensors(_entry(), length=2**64 - 1),
    "100 MB": safetensors(_entry(), length=100_000_000),
    "length of 0": safetensors(_entry(), length=0),
    "not even a length": b"\x01\x00",
    "deep": safetensors(b"[" * MANY),
    "deep entry": safetensors(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "no object": safetensors(b"[1, 2]"),
    "not text": safetensors(b"\xff\xfe\x00{"),
    "name twice": safetensors(_entry()[:-1] + b", " + _entry()[1:]),
    "unknown type": safetensors(_entry(dtype='"C64"')),
    "type that is a list": safetensors(_entry(dtype="[1]")),
    "type that is null": safetensors(_entry(dtype="null")),
    "negative side": safetensors(_entry(shape="[-2, -3]")),
    "side that is a flag": safetensors(_entry(shape="[2, 3, true]")),
    "side that is a fraction": safetensors(_entry(shape="[2.0, 3]")),
    "enormous sides": safetensors(_entry(shape="[" + "9" * 4000 + ", 9]")),
    "more digits than a number may have": safetensors(_entry(shape="[" + "9" * 5000 + ", 9]")),
    "empty with enormous sides": safetensors(_entry(shape=f"[{2**62}, {2**62}, 0]", place="[0, 0]"), b""),
    "many axes": safetensors(_entry(shape="[" + "1," * 200_000 + "6]")),
    "many enormous axes": safetensors(_entry(shape="[" + "9999999999999999999," * 100_000 + "6]")),
    "shape is text": safetensors(_entry(shape='"23"')),
    "negative place": safetensors(_entry(place="[-24, 0]")),
    "place behind the end": safetensors(_entry(place="[24, 48]")),
    "enormous place": safetensors(_entry(place="[99999999999999999999, 100000000000000000023]")),
    "fractional place": safetensors(_entry(place="[0.0, 24.0]")),
    "place of text": safetensors(_entry(place='["0", "24"]')),
    "three places": safetensors(_entry(place="[0, 12, 24]")),
    "values left over": safetensors(_entry(), bytes(48)),
    "values missing": safetensors(_entry(), bytes(12)),
    "overlap": safetensors(_entry()[:-1] + b', "b": ' + _entry()[6:], bytes(24)),
    "entry is a number": safetensors(b'{"a": 1}'),
    "nothing": b"",
}  # fmt: skip

JSON_TEXTS: Mapping[str, bytes] = {
    "deep list": b"[" * MANY,
    "deep object": b'{"a":' * MANY,
    "huge number": b'{"d_sae": ' + b"9" * 5000 + b"}",
    "large number": b'{"d_sae": ' + b"9" * 4000 + b"}",
    "infinite": b'{"d_sae": 1e999, "d_in": NaN}',
    "list": b"[]",
    "null": b"null",
    "not text": b"\xff\xfe\x00\x00",
    "empty": b"",
    "keys that are empty": b'{"": {"": {"": 1}}}',
}

YAML_TEXTS: Mapping[str, bytes] = {
    "aliases of aliases": b"a0: &a0 [x, x]\n"
    + b"".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n".encode() for n in range(1, 60)),
    "merged aliases": b"a0: &a0 {x: 1}\n"
    + b"".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}, *a{n - 1}]}}\n".encode() for n in range(1, 40)),
    "holds itself": b"a: &a [*a]\nmodel_name: *a\n",
    "deep": b"a: " + b"[" * 50_000,
    "code": f"a: !!python/object/apply:os.system ['touch {CANARY}']".encode(),
    "number without digits": b"a: !!int ''\nb: !!float ''",
    "flag that is none": b"a: !!bool x",
    "date that is none": b"a: !!timestamp x",
    "impossible date": b"a: 2020-99-99",
    "hexadecimal number": b"model_name: 0x" + b"f" * 100_000,
    "number in base 60": b"model_name: 1" + b":59" * 20_000,
    "fraction in base 60": b"model_name: 1" + b":59" * 20_000 + b".5",
    "key that is a list": b"? [1, 2]\n: 3",
    "two documents": b"a: 1\n---\nb: 2",
    "list": b"- 1\n- 2",
    "empty": b"",
    "not text": b"\xff\xfe\x00\xd8",
    "control characters": b"a: \x00\x01",
}  # fmt: skip
