"""``train_pretrain.py`` as it is, but for the model's part: each step's records are written down, its loss is zero.

Loading, the order, the workers, checkpoints and going on are those of a real run, at the speed at which data can be
read. ``$SEEN`` is the folder of ``rank-step`` files: the numbers of a rank's records, as int64.
"""

from __future__ import annotations

import os
from pathlib import Path

import train_pretrain
from llava.train.trainer import LlavaTrainer


def main() -> None:
    seen = Path(os.environ["SEEN"])

    def write_down(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        step = self.state.global_step + 1
        (seen / f"{self.args.process_index}-{step:05d}").write_bytes(inputs["records"].cpu().numpy().tobytes())
        # Through every parameter and the model's wrapper, so that the engine's gradients meet.
        inner = self.accelerator.unwrap_model(model)
        return sum(parameter.sum() for parameter in inner.parameters() if parameter.requires_grad) * 0.0

    LlavaTrainer.compute_loss = write_down
    train_pretrain.main()
