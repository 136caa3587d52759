"""A loop of plain torch that measures its task vector, stops half way and goes on: python examples/torch_loop.py [OUTPUT]"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lata_lightning import TaskVectorMonitor
from lata_lightning.quickstart.corpus import replay_text
from lata_lightning.quickstart.experts import BASE, INSTRUCT


def main(output: Path) -> None:
    tokens = AutoTokenizer.from_pretrained(INSTRUCT)(replay_text()[:16_000], verbose=False)["input_ids"]
    batches = torch.tensor(tokens[: len(tokens) // 512 * 512]).view(-1, 4, 128)
    checkpoint = output / "checkpoint.pt"
    for stop in (4, 8):
        model = AutoModelForCausalLM.from_pretrained(INSTRUCT).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
        # The weights that the model has here are the start, so a checkpoint is restored afterwards.
        monitor = TaskVectorMonitor(model, (str(BASE), str(INSTRUCT)))
        first = 0
        if checkpoint.exists():
            state = torch.load(checkpoint, weights_only=True)
            monitor.load_state_dict(state["monitor"])
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            first = state["step"]
        for step in range(first, stop):
            model(input_ids=batches[step], labels=batches[step]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % 2 == 0:
                alignment = monitor.measure(step + 1)
                print(
                    f"step {step + 1}: norm {monitor.history[-1].figures['task_norm']:.3f}, least aligned {min(alignment.values.values()):.4f}"
                )
        output.mkdir(parents=True, exist_ok=True)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "monitor": monitor.state_dict(), "step": stop}
        torch.save(state, checkpoint)
    monitor.save(output / "task_vector")
    monitor.save_history(output / "history.jsonl")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "torch-loop-run"))
