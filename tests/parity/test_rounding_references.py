"""The bfloat16 references of tests/fixtures/rounding, made anew: `pytest -m parity`."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the parity extra: torch")
pytest.importorskip("transformers", reason="needs the parity extra: transformers")

import make_rounding
import odd_pairs
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("flavour", odd_pairs.FLAVOURS)
def test_the_stored_references_are_what_transformers_computes(flavour, tmp_path):
    """Bit for bit, but for sums that another processor adds in another order."""
    if flavour == "moe26" and not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        pytest.skip("stored with AVX-512; without it torch's products choose other experts")
    torch.set_num_threads(1)
    odd_pairs.write_pair(flavour, tmp_path)
    made = make_rounding.references(tmp_path)
    stored = load_file(odd_pairs.REFERENCES / f"{flavour}.safetensors")
    assert made.keys() == stored.keys() and len(made) > 20
    for name, tensor in stored.items():
        assert made[name].dtype == tensor.dtype and made[name].shape == tensor.shape
        ours, theirs = (a.double().numpy() for a in (made[name], tensor))
        assert np.isfinite(ours).all()
        # A tensor of the whole model in one run: a number rounded otherwise moves those after it
        assert (ours != theirs).mean() <= 0.2, name
        assert np.abs(ours - theirs).max() <= 0.05 * np.abs(theirs).max(), name
