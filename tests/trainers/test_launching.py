"""Do the two training commands read LoRA's names alike, and refuse what comes too late?  (Loading and resuming: theirs.)"""

import pytest

from modeling_axk1 import AxK1ForCausalLM
from tests.random_models import random_config, tiny_chat_config
from trainers import rl, sft
from trainers.dapo_gspo import DapoGspoConfig
from trainers.launching import load_policy, name_lora
from trainers.think_fusion import ThinkFusionConfig


@pytest.mark.parametrize("command", [rl, sft], ids=["rl", "sft"])
def test_a_file_that_is_no_yaml_is_refused(tmp_path, command):
    (tmp_path / "bad.yaml").write_text("max_steps: [1")
    with pytest.raises(ValueError, match="The file under --config is not YAML: while parsing a flow sequence"):
        command.parse(["--config", str(tmp_path / "bad.yaml")])


@pytest.mark.parametrize("command", [rl, sft], ids=["rl", "sft"])
@pytest.mark.parametrize(
    ("given", "kept"),
    [(["o_proj"], ["o_proj"]), (["q_b_proj", "o_proj"], ["q_b_proj", "o_proj"]), (["all-linear"], "all-linear")],
)
def test_one_lora_target_is_a_name_and_no_pattern(tmp_path, command, given, kept):
    """TRL makes a text of a list of one; PEFT would match it with whole paths, and attach nothing."""
    settings = ["--model_name_or_path", "m", "--dataset", "d", "--output_dir", str(tmp_path), "--use_cpu", "true"]
    settings += ["--bf16", "false", "--use_peft", "true", "--lora_target_modules", *given]
    _, _, model = command.parse(settings)
    assert model.lora_target_modules == kept


@pytest.mark.parametrize("command", [rl, sft], ids=["rl", "sft"])
def test_lora_targets_are_this_models_names(tmp_path, command):
    """Found without weights: there are none in the folder."""
    tiny_chat_config(64).save_pretrained(tmp_path)
    settings = [
        "--model_name_or_path",
        str(tmp_path),
        "--dataset",
        "d",
        "--output_dir",
        str(tmp_path),
        "--use_cpu",
        "true",
    ]
    settings += ["--bf16", "false", "--lora_targets", "routed", "shared"]

    def named(*more):
        arguments, config, model = command.parse([*settings, *more])
        return name_lora(model, arguments.lora_targets, config.trust_remote_code)

    lora = named("--use_peft", "true", "--lora_dropout", "0", "--use_rslora", "true", "--lora_r", "3")
    assert lora.target_modules == {f"shared_experts.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
    assert lora.target_parameters == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    assert (lora.r, lora.lora_dropout, lora.use_rslora) == (3, 0, True)
    with pytest.raises(ValueError, match="lora_dropout=0.05 is not available on routed experts; add --lora_dropout 0"):
        named("--use_peft", "true")
    with pytest.raises(ValueError, match="adapts nothing; add --use_peft true"):
        named()
    with pytest.raises(ValueError, match="give only one kind"):
        named("--use_peft", "true", "--lora_target_modules", "o_proj")


@pytest.mark.parametrize("command", [rl, sft], ids=["rl", "sft"])
def test_a_model_has_to_be_named(tmp_path, command):
    with pytest.raises(ValueError, match="No model is named"):
        command.parse(["--dataset", "d", "--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"])


def test_a_built_model_is_not_quantised_in_silence(tmp_path):
    model = AxK1ForCausalLM(tiny_chat_config(64))
    args = DapoGspoConfig(str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match="comes too late"):
        load_policy(model, args, None, quantization_config=object())


def test_the_balance_loss_of_pretraining_is_left_out_and_said(tmp_path, caplog):
    """TRL would add Mixtral's in its place, or stop at a field that its model's configuration has."""
    model = AxK1ForCausalLM(random_config(1, router_aux_loss_coef=0.1))
    settings = {"output_dir": tmp_path, "use_cpu": True, "bf16": False}
    load_policy(model, ThinkFusionConfig(**settings), object(), quantization_config=None)
    assert model.config.router_aux_loss_coef == 0.0
    assert "router_aux_loss_coef=0.1 of the model is set to 0" in caplog.text
    wrong = ThinkFusionConfig(**settings, router_aux_loss_coef=0.2)
    with pytest.raises(ValueError, match="router_aux_loss_coef=0.2 adds a softmax router's balance loss"):
        load_policy(model, wrong, object(), quantization_config=None)
