"""Runs received traces as a server does, in a separate process that cannot import `hf_gated_sae`."""

import pickle
import sys

import torch
from nnsight.schema.request import RequestModel
from nnsight.tracing.tracer import dec, inc

from tests.hooks.nnsight_support import wrapped


def run(family, blob):
    lm = wrapped(*family.split())
    tracer = RequestModel.deserialize(blob, lm._remoteable_persistent_objects())
    frame = tracer.info.frame
    inc()
    try:
        with torch.no_grad():
            tracer.execute(tracer.info.code)
    finally:
        dec()
    return frame.f_locals["result"]


if __name__ == "__main__":
    assert "hf_gated_sae" not in sys.modules
    sys.modules["hf_gated_sae"] = None  # makes importing it fail
    torch.set_num_threads(1)
    requests = pickle.loads(sys.stdin.buffer.read())
    torch.save([run(family, blob) for family, blob in requests], sys.argv[1])
