"""The ops: the operations that take most of a model's time, a folder for each, with several implementations (forms).

An `Op` (`forms.py`) holds its forms and chooses one for a device, dtype and head size; a model asks for it once, when
it has been placed on its device. The form `reference` is the formula in double precision: tests and benchmarks check
the other forms against it.
"""

from __future__ import annotations


def forms_here() -> dict[str, str]:
    """For every op and kind of device here, the form that runs in bf16 at heads of 64 channels, and why."""
    import torch  # imported here, so that importing one op does not import them all

    from longwave.ops.attention import ATTENTION
    from longwave.ops.block_sparse import BLOCK_SPARSE
    from longwave.ops.cross_entropy import CROSS_ENTROPY
    from longwave.ops.decay_linear import DECAY_LINEAR
    from longwave.ops.forms import Call
    from longwave.ops.gated import GATED
    from longwave.ops.linear import LINEAR

    kinds, found = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])], dict[str, str]()
    for op in (ATTENTION, BLOCK_SPARSE, DECAY_LINEAR, LINEAR, GATED, CROSS_ENTROPY):
        for kind in kinds:
            form, reason = op.resolve(Call(torch.device(kind), torch.bfloat16, head_size=64))
            found[op.name if len(kinds) == 1 else f"{op.name} on {kind}"] = f"{form} ({reason})"
    return found
