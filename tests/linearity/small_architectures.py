"""Real architectures with two small blocks, two fine-tunes of each, and samples for both."""

import torch
import transformers
from linear_models import tuned

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SMALL, "vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def build(architecture):
    """A start, two tuned models, and what else is said of an architecture: (model class, config class, settings, anything)."""
    model, config, settings, said = architecture
    torch.manual_seed(0)
    start = getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()
    return start, [tuned(start, size=0.05, seed=seed) for seed in (1, 2)], said


def samples_of(name):
    """Two batches of the first task and one of the second; the first row of each batch is padded, where there is padding."""
    generator = torch.Generator().manual_seed(3)
    batches = []
    for count in (2, 3, 4):
        if name == "vit":
            batches.append({"pixel_values": torch.randn(count, 3, 8, 8, generator=generator)})
            continue
        mask = torch.ones(count, 7, dtype=torch.long)
        mask[0, 4:] = 0
        batch = {"input_ids": torch.randint(3, 40, (count, 7), generator=generator), "attention_mask": mask}
        if name == "t5":
            batch |= {"decoder_input_ids": torch.randint(3, 40, (count, 5), generator=generator), "decoder_attention_mask": mask[:, :5]}
        batches.append(batch)
    return [batches[:2], batches[2:]]
