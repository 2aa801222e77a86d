"""lm-eval's model class on a model in memory. Imported late: lm-eval takes seconds to import."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from pruner_lib.evaluation.running import EvaluationError, check_vocabulary, keeps_last_logits

Request = tuple[Any, list[int], list[int]]  # (texts, context, continuation)


class HarnessModel(HFLM):
    """``HFLM`` with batches of about as many tokens instead of as many items.

    The harness sorts the requests by length and pads to the right. A batch here is as many
    requests as fit into ``batch_tokens`` with the longest first, so that short items run in large
    batches and long ones do not fill the memory. Logits are kept from the first scored position of a batch
    on: the vocabulary is most of the memory, and the context's logits are never read. Scores are those of
    ``HFLM`` but for rounding. Softmax is in float32.

    Args:
        model: on its device; put into evaluation mode by ``HFLM`` (the caller puts it back).
        tokenizer: copied, since ``HFLM`` may give it a padding token.
        batch_tokens: of one batch, padding included.
        truncate: cut contexts that are too long from the left, as ``HFLM`` does; otherwise refuse.
        dtype: of autocast, or None to compute in the model's own.
        progress: show a bar.
    """

    batch_size_per_gpu: Any

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_tokens: int,
        truncate: bool,
        dtype: str | None,
        progress: bool,
    ) -> None:
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise EvaluationError(
                "the tokenizer has neither a BOS nor an EOS token; the harness puts one before items without "
                "context. Set tokenizer.eos_token"
            )
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=copy.deepcopy(tokenizer),
            batch_size=1,
            softmax_dtype="float32",
            mixed_precision_dtype=dtype,
        )
        self.truncated: dict[str, set[int]] = {}
        self._batch_tokens = batch_tokens
        self._truncate = truncate
        self._progress = progress
        self._asked: Sequence[Any] = ()
        self._batch_end = 0
        self._keep = 0
        self._can_keep = keeps_last_logits(model)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._asked = requests
        try:
            return super().loglikelihood(requests, disable_tqdm=not self._progress)
        finally:
            self._asked = ()

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        self._check(requests)
        if override_bs is not None:  # rolling windows come in batches of their own
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        size = self.batch_size_per_gpu
        self.batch_size_per_gpu, self._batch_end = "auto", 0  # makes HFLM ask _batch_scheduler
        try:
            return super()._loglikelihood_tokens(requests, disable_tqdm)
        finally:
            self.batch_size_per_gpu, self._keep = size, 0

    def _check(self, requests: list[Request]) -> None:
        """Refuse before the first forward pass what could not be scored.

        Raises:
            EvaluationError: a token id outside the vocabulary, an item longer than the context.
        """
        for place, (_, context, continuation) in enumerate(requests):
            where = self._where(place)
            ids = context + continuation
            check_vocabulary(self.model, min(ids, default=0), max(ids, default=0), where)
            total = len(context) + len(continuation)
            if total <= self.max_length + 1:  # the last token is predicted, not read
                continue
            if not self._truncate or len(continuation) > self.max_length:
                raise EvaluationError(
                    f"{where} has {len(context)} + {len(continuation)} tokens (context + answer), beyond the "
                    f"model's context of {self.max_length}; leave the task out, or cut contexts from the "
                    "left as the harness does with truncate=True (an answer must fit as it is)"
                )
            if self._asked:
                item = self._asked[place]
                self.truncated.setdefault(item.task_name, set()).add(item.doc_id)

    def _where(self, place: int) -> str:
        if place >= len(self._asked):
            return f"request {place}"
        return f"task {self._asked[place].task_name!r}, item {self._asked[place].doc_id},"

    def _batch_scheduler(self, pos: int, n_reordered_requests: Sequence[Request]) -> int:
        """Requests in the batch that holds request ``pos``; HFLM asks again for each of them."""
        if pos >= self._batch_end:
            longest = self._length(n_reordered_requests[pos])
            self._batch_size = max(1, self._batch_tokens // longest)
            self._batch_end = pos + self._batch_size
            batch = n_reordered_requests[pos : self._batch_end]
            self._keep = longest - min(self._length(request) - len(request[2]) for request in batch)
        return self._batch_size

    def _length(self, request: Request) -> int:
        """Tokens that are read: all but the last one."""
        return max(1, min(len(request[1]) + len(request[2]) - 1, int(self.max_length)))

    def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Tensor:
        """Logits ``[B, T, V]``, or those of the last positions that the batch is scored at."""
        if not (self._keep and self._can_keep):
            return super()._model_call(inps, attn_mask, labels)
        autocast = torch.autocast(
            self.device.type,
            dtype=self.mixed_precision_dtype,
            enabled=self.mixed_precision_dtype is not None,
        )
        with torch.no_grad(), autocast:
            return self.model(input_ids=inps, logits_to_keep=self._keep, use_cache=False).logits
