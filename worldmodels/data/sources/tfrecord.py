"""Gzipped TFRecord files of tf.Example records, without TensorFlow.

A record is the length of its data (u64), the checksum of these eight bytes (u32), the data, and their checksum (u32),
all little-endian; a checksum is a crc32c, rotated and shifted (tensorflow, core/lib/io/record_writer.h and
core/lib/hash/crc32c.h). The data are a protobuf message `Example` (core/example/example.proto and feature.proto).
"""

import gzip
import struct
from collections.abc import Iterator
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from google_crc32c import value as crc32c

from worldmodels.data.sources.gzipped import sentences
from worldmodels.data.sources.reading import bad

MAX_RECORD = 2**28  # bytes; an episode of 27,000 frames that do not compress has 190 MB
_DTYPES = {"float_list": np.float32, "int64_list": np.int64}
_MESSAGES = """
    name: "example.proto" package: "tensorflow" syntax: "proto3"
    message_type { name: "BytesList" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_BYTES } }
    message_type { name: "FloatList" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_FLOAT } }
    message_type { name: "Int64List" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_INT64 } }
    message_type {
      name: "Feature"
      oneof_decl { name: "kind" }
      field { name: "bytes_list" number: 1 type: TYPE_MESSAGE type_name: ".tensorflow.BytesList" oneof_index: 0 }
      field { name: "float_list" number: 2 type: TYPE_MESSAGE type_name: ".tensorflow.FloatList" oneof_index: 0 }
      field { name: "int64_list" number: 3 type: TYPE_MESSAGE type_name: ".tensorflow.Int64List" oneof_index: 0 }
    }
    message_type {
      name: "Features"
      nested_type {
        name: "FeatureEntry"
        field { name: "key" number: 1 type: TYPE_STRING }
        field { name: "value" number: 2 type: TYPE_MESSAGE type_name: ".tensorflow.Feature" }
        options { map_entry: true }
      }
      field {
        name: "feature" number: 1 label: LABEL_REPEATED
        type: TYPE_MESSAGE type_name: ".tensorflow.Features.FeatureEntry"
      }
    }
    message_type {
      name: "Example" field { name: "features" number: 1 type: TYPE_MESSAGE type_name: ".tensorflow.Features" }
    }
"""


def masked(data: bytes) -> int:
    """The checksum of a TFRecord."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@cache
def example_class() -> Any:
    """The protobuf message tf.Example."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

    pool = (
        descriptor_pool.DescriptorPool()
    )  # of our own: TensorFlow, where it is installed, has its Example in the usual
    pool.Add(text_format.Parse(_MESSAGES, descriptor_pb2.FileDescriptorProto()))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))


def records(path: Path) -> Iterator[bytes]:
    """The data of the records of a file, in order.

    Raises:
        UserError: the file is missing, truncated or damaged, or a record claims more than 256 MB.
    """
    with sentences(path), gzip.open(path) as file:
        for number in count():
            if not (head := file.read(12)):
                return
            where = f"{path}, record {number}"
            if len(head) < 12 or masked(head[:8]) != struct.unpack("<I", head[8:])[0]:
                raise bad(where, "no TFRecord begins here (the checksum of its length is wrong)")
            size = struct.unpack("<Q", head[:8])[0]
            if size > MAX_RECORD:
                raise bad(where, f"it claims {size} bytes; allowed are {MAX_RECORD}")
            data, checksum = file.read(size), file.read(4)
            if len(data) < size or len(checksum) < 4:
                raise bad(where, "the file ends within it")
            if masked(data) != struct.unpack("<I", checksum)[0]:
                raise bad(where, "its bytes are damaged (their checksum is wrong)")
            yield data


def features(data: bytes, where: str) -> dict[str, Any]:
    """The features of a tf.Example by name: a list of bytes, or an array (n,) of float32 or int64; None without value.

    Args:
        data: of a record.
        where: it is, for the message.

    Raises:
        UserError: it is no tf.Example.
    """
    from google.protobuf.message import DecodeError

    try:
        example = example_class().FromString(data)
    except DecodeError as e:
        raise bad(where, f"it is no tf.Example ({e})") from e
    found: dict[str, Any] = {}
    for name, feature in example.features.feature.items():
        if kind := feature.WhichOneof("kind"):
            values = getattr(feature, kind).value
            found[name] = list(values) if kind == "bytes_list" else np.array(values, _DTYPES[kind])
    return found
