"""Names of tensors in a longwave folder; `foreign.py` maps them to other formats and back."""

from __future__ import annotations

from longwave.model import Decoder


def flat_names(model: Decoder) -> dict[str, str]:
    """Module-tree name of every tensor -> its name in a folder.

    Blocks and resamplers are numbered flat, in the order of the layout, so that a Llama and a SUBLLM of one shape have
    the same names for what they share: `blocks.7.mixer.q_proj.weight`, `resamplers.0.score.weight`.
    """
    modules = {id(part): part.site.name for part in (*model.blocks, *model.brackets)}
    prefixes = {name: modules[id(module)] for name, module in model.named_modules() if id(module) in modules}
    ordered = sorted(prefixes, key=len, reverse=True)  # the innermost part that holds a tensor names it
    names = {}
    for name in model.state_dict(keep_vars=True):
        prefix = next((one for one in ordered if name.startswith(f"{one}.")), None)
        names[name] = name if prefix is None else prefixes[prefix] + name[len(prefix) :]
    return names
