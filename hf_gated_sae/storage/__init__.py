"""Tensors in files, read in part: local files by memory map, remote ones by HTTP ranges; nothing is unpickled."""

from .bytes import ByteSource, LocalBytes
from .files import LFS, LFS_POINTER, TENSOR_FILES, Content, flat, read_content
from .stored import StoredTensor

__all__ = [
    "LFS",
    "LFS_POINTER",
    "TENSOR_FILES",
    "ByteSource",
    "Content",
    "LocalBytes",
    "StoredTensor",
    "flat",
    "read_content",
]
