"""What training holds besides weights: the tensors that the backward pass will read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from pruner_lib.discovery.tracing import meta_copy
from pruner_lib.evaluation.cost import ways_to_call
from pruner_lib.evaluation.running import EvaluationError, check_context, check_counts


def count_activations(model: nn.Module, *, batch_size: int = 1, seq_len: int = 64) -> int:
    """Bytes that one forward pass keeps for the backward pass, weights left out.

        activations = Σ bytes of the distinct tensors that operators save, up to the logits

    A copy without weights runs once on the meta device, so a configuration is enough; autograd tells each
    tensor that an operator saves. With ``model.activation_checkpointing_enable()`` only the inputs of the
    layers are held between the passes, and counted. Not in it: the loss's own copies of the logits, and
    what a fused attention kernel spares (here the whole square of scores is saved).

    >>> with torch.device("meta"):
    ...     model = LlamaForCausalLM(config_of_7b).half()
    >>> count_activations(model, batch_size=4, seq_len=256) / 2**30  # GiB
    7.47

    Args:
        model: a causal language model, on any device; left as it was. Parameters that need no gradient
            (LoRA's frozen ones) have fewer tensors saved for them.
        batch_size: sequences of the pass.
        seq_len: tokens of each.

    Raises:
        EvaluationError: a size below 1, a length beyond the context, a model that cannot run on the meta
            device.
    """
    check_counts({"batch_size": (batch_size, 1), "seq_len": (seq_len, 1)})
    check_context(model, seq_len, "seq_len")
    skeleton = meta_copy(model).train()  # in evaluation mode nothing is checkpointed
    for name, parameter in model.named_parameters():
        skeleton.get_parameter(name).requires_grad_(parameter.requires_grad)
    failures = []
    for inputs in ways_to_call(skeleton, batch_size, seq_len):
        if inputs.get("use_cache"):
            continue
        try:
            return _saved(skeleton, inputs)
        except Exception as error:  # the model's own code fails in its own way; the next call may do
            failures.append(f"with {', '.join(inputs)}: {type(error).__name__}: {str(error)[:200]}")
    raise EvaluationError(
        f"{type(model).__name__} could not be run on the meta device, so its activations cannot be counted. "
        f"Tried {'; '.join(failures)}"
    )


def _saved(skeleton: nn.Module, inputs: dict[str, Any]) -> int:
    """Bytes of the storages that a forward pass saves and that are not the model's own."""
    own = {_storage(tensor) for tensor in [*skeleton.parameters(), *skeleton.buffers()]}
    kept: dict[int, Tensor] = {}  # holding the tensor keeps its storage's number from being given again

    def keep(tensor: Tensor) -> Tensor:
        number = _storage(tensor)
        if number not in own:
            kept[number] = tensor
        return tensor

    with torch.enable_grad(), torch.device("meta"), saved_tensors_hooks(keep, lambda tensor: tensor):
        skeleton(**inputs)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _storage(tensor: Tensor) -> int:
    return int(StorageWeakRef(tensor.untyped_storage()).cdata)
