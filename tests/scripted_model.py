"""A model that says what it is told to, to test what reads its words."""

import torch
from transformers import GenerationConfig, PretrainedConfig


class ScriptedModel(torch.nn.Module):
    """Writes given ids after any prompt, padded as `generate` pads, and keeps what it was asked."""

    device = torch.device("cpu")

    def __init__(self, scripts, stop_id, pad_id):
        super().__init__()
        self.scripts, self.pad_id, self.asked, self.settings = list(scripts), pad_id, [], []
        self.generation_config = GenerationConfig(eos_token_id=stop_id)
        self.config = PretrainedConfig(name_or_path="scripted")

    def generate(self, input_ids, attention_mask, **settings):
        assert not self.training
        self.asked += [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask)]
        self.settings.append(settings)
        scripts = [self.scripts.pop(0) for _ in input_ids]
        longest = max(map(len, scripts))
        return torch.cat([input_ids, torch.tensor([s + [self.pad_id] * (longest - len(s)) for s in scripts])], dim=1)
