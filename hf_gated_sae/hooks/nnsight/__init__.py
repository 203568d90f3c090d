"""The nnsight back-end: the same interventions inside nnsight's traces, and latents as values of its envoys.

nnsight is imported when one of these functions is called, never before: its import changes global state (every object
gets a ``save``, and `torch.Tensor.backward` is replaced).

    lm = TransformersModel(model, tokenizer=tokenizer, task="text-generation")
    edited = edit(lm, Ablate(sae, [123]))          # acts in every trace and generate of `edited`, not of `lm`
    with edited.trace("The Eiffel Tower"):
        logits = edited.lm_head.output.save()

    lm = TransformersModel(model, tokenizer=tokenizer, envoys=sae_envoys(model, sae))
    with lm.trace("The Eiffel Tower"):
        latents = lm.model.layers[5].latents.save()
        lm.model.layers[5].latents[..., 42] = 10.0
"""

from ...versions import require_supported

require_supported("nnsight")

from .edit import edit, report  # noqa: E402
from .envoys import sae_envoys  # noqa: E402

__all__ = ["edit", "report", "sae_envoys"]
