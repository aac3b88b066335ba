"""The hot maths: a folder per op, whose forms an `Op` holds; it resolves one for a device, a type and a head size.

`reference` is the plain twin in high precision. A model resolves the forms of its parts once it has been placed.
"""

from __future__ import annotations


def forms_here() -> dict[str, str]:
    """The form that every op runs in bf16, at heads of 64, on each kind of device of this machine, and why."""
    import torch  # late, since whoever wants one op needs no other

    from longwave.ops.attention import ATTENTION
    from longwave.ops.block_sparse import BLOCK_SPARSE
    from longwave.ops.cross_entropy import CROSS_ENTROPY
    from longwave.ops.decay_linear import DECAY_LINEAR
    from longwave.ops.forms import Call
    from longwave.ops.linear import LINEAR

    kinds, found = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])], dict[str, str]()
    for op in (ATTENTION, BLOCK_SPARSE, DECAY_LINEAR, LINEAR, CROSS_ENTROPY):
        for kind in kinds:
            form, reason = op.resolve(Call(torch.device(kind), torch.bfloat16, head_size=64))
            found[op.name if len(kinds) == 1 else f"{op.name} on {kind}"] = f"{form} ({reason})"
    return found
