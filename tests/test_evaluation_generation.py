"""Greedy is greedy whatever a model's own generation settings say, and they come back as they were."""

import copy
import json

import pytest
import torch
from test_evaluation_perplexity import tiny_llama, word_tokenizer
from transformers import GenerationConfig

from pruner_lib.evaluation import generate

PROMPTS = ["w1 w2 w3", "w9 w8"]
OWN = {
    "repetition_penalty": 1.8,
    "no_repeat_ngram_size": 2,
    "num_beams": 3,
    "min_new_tokens": 20,
    "suppress_tokens": list(range(0, 40, 2)),
    "do_sample": True,
    "min_p": 0.5,
    "typical_p": 0.4,
    "epsilon_cutoff": 0.01,
    "top_k": 2,
}


def with_own_settings(model):
    model = copy.deepcopy(model)
    for name, value in OWN.items():
        setattr(model.generation_config, name, value)
    return model


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_models_own_settings_do_not_take_part(do_sample):
    plain, tokenizer = tiny_llama(torch.float32), word_tokenizer(eos_token="</s>")
    opinionated = with_own_settings(plain)
    before, kept = opinionated.generation_config, copy.deepcopy(opinionated.generation_config)
    both = generate(
        {"plain": plain, "own": opinionated}, tokenizer, PROMPTS, max_new_tokens=12, do_sample=do_sample
    )
    for prompt in PROMPTS:
        assert both.text("own", prompt) == both.text("plain", prompt)
    assert opinionated.generation_config is before
    assert before.to_dict() == kept.to_dict()


def test_settings_of_a_model_inside_an_adapter_do_not_take_part_either():
    from peft import LoraConfig, get_peft_model

    plain, tokenizer = tiny_llama(torch.float32), word_tokenizer(eos_token="</s>")
    config = LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")
    adapted = get_peft_model(with_own_settings(plain), config)
    before = json.loads(adapted.base_model.model.generation_config.to_json_string())
    both = generate({"plain": plain, "own": adapted}, tokenizer, PROMPTS, max_new_tokens=8)
    assert [both.text("own", p) for p in PROMPTS] == [both.text("plain", p) for p in PROMPTS]
    assert json.loads(adapted.base_model.model.generation_config.to_json_string()) == before


def test_own_end_tokens_are_used_and_an_exception_leaves_the_settings():
    model, tokenizer = with_own_settings(tiny_llama(torch.float32)), word_tokenizer(eos_token="</s>")
    first = generate({"m": model}, tokenizer, "w1 w2", max_new_tokens=1)
    token = tokenizer(first.text("m", "w1 w2"))["input_ids"][0]
    own = model.generation_config = GenerationConfig(eos_token_id=token, repetition_penalty=1.5)
    assert generate({"m": model}, tokenizer, "w1 w2", max_new_tokens=9).rows[0].num_tokens == 1

    def fail(*words):
        raise RuntimeError("closed")

    with pytest.raises(RuntimeError, match="closed"):
        generate({"m": model}, tokenizer, "w1 w2", max_new_tokens=9, on_text=fail)
    assert model.generation_config is own
    assert own.repetition_penalty == 1.5
