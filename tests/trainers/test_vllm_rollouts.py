"""Does vLLM get a policy's weights as a checkpoint stores them?  tests/interop/test_vllm_runs.py gives them to vLLM itself."""

from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from peft import LoraConfig

from tests.folders import assert_same_bits, on_disk
from tests.random_models import adapt, ours, random_config
from trainers.adapters import lora_config

distributed = pytest.importorskip("trl.distributed", reason="TRL 1.16 needs Python 3.11")
from trl.generation.vllm_generation import VLLMGeneration  # noqa: E402

from trainers.vllm_rollouts import StoredWeightsGeneration  # noqa: E402


def generation(model, mode: str, **more) -> StoredWeightsGeneration:
    """As TRL makes it, but without vLLM."""
    made = object.__new__(VLLMGeneration)
    made.model, made.mode, made._dist = model, mode, distributed.DistributedBackend(Accelerator(cpu=True))
    vars(made).update(more)
    return StoredWeightsGeneration(made)


@pytest.mark.parametrize("adapted", [False, True])
def test_a_server_gets_what_a_checkpoint_holds(adapted, tmp_path):
    # Dense and sparse layers, a balancing bias, a prediction layer.
    model = ours(random_config(1, first_k_dense_replace=1, num_nextn_predict_layers=1, tie_word_embeddings=False))
    if adapted:
        model = adapt(model, lora_config(model, r=2))
    sent = {name: tensor.clone() for name, tensor in generation(model, "server")._iter_named_params()}
    (model.merge_and_unload() if adapted else model).save_pretrained(tmp_path)
    stored = on_disk(tmp_path)
    assert any("experts.0.gate_proj" in name for name in stored) and any("correction_bias" in name for name in stored)
    assert_same_bits(sent, stored)


@pytest.mark.parametrize("adapted", [False, True])
def test_vllm_in_the_same_process_takes_them_as_a_reload(adapted, tmp_path):
    reloaded = {}
    worker = SimpleNamespace(reload_weights=lambda weights_iterator: reloaded.update(weights_iterator))
    engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))
    model = ours(random_config(2, topk_method="noaux_tc", tie_word_embeddings=False))
    if adapted:
        # The router among them, whose buffer is vLLM's weight.
        routers = {"target_parameters": ["mlp.gate.weight"], "target_modules": ["lm_head", "o_proj"]}
        model = adapt(model, LoraConfig(r=2, **routers))
    one_process = generation(model, "colocate", llm=SimpleNamespace(llm_engine=engine))
    # TRL's loop, which would load them one by one, has nothing left to do.
    assert list(one_process._iter_named_params()) == []
    # What was kept till now is the adapted model still.
    (model.merge_and_unload() if adapted else model).save_pretrained(tmp_path)
    assert_same_bits(reloaded, on_disk(tmp_path))
