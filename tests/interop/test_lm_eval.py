"""Does lm-evaluation-harness' own Hugging Face wrapper score our model as its logits say?"""

import pytest
import torch
from transformers import AutoTokenizer

from modeling_axk1 import AxK1ForCausalLM

pytest.importorskip("lm_eval", reason="the eval extra is not installed")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402


def test_likelihoods_are_those_of_the_logits(checkpoint):
    model, tokenizer = AxK1ForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    judge = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    pairs = [("What is 4 * 5?", " Let me see."), ("The answer to 12 + 3 is", " 15.")]
    asked = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    scores = [score for score, _ in judge.loglikelihood(asked, disable_tqdm=True)]
    for (context, answer), score in zip(pairs, scores):
        begin = len(tokenizer(context).input_ids)
        ids = torch.tensor([tokenizer(context + answer).input_ids])
        with torch.no_grad():
            logs = model(ids).logits.log_softmax(-1)
        expected = logs[0, :-1].gather(1, ids[0, 1:, None])[begin - 1 :].sum().item()
        assert score == pytest.approx(expected, abs=1e-4)
