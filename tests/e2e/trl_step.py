"""One GRPO step of a tiny vision-language model by TRL, rewarded by the service. ARGUMENTS: folder, URL, output."""

import json
import sys

from datasets import Dataset
from PIL import Image
from trl import GRPOConfig, GRPOTrainer

from megatron_r1reward.serving.clients import TrlReward

folder, url, output = sys.argv[1:]
prompt = [{"role": "user", "content": "Which digit does the image show?"}]
images = [[Image.new("RGB", (56, 56), color)] for color in ("red", "blue")]
reward = TrlReward(url)
trainer = GRPOTrainer(
    model=folder,
    reward_funcs=[reward],
    args=GRPOConfig(
        output_dir=output,
        max_steps=1,
        per_device_train_batch_size=2,
        num_generations=2,
        max_completion_length=8,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
    ),
    train_dataset=Dataset.from_dict({"prompt": [prompt] * 2, "images": images}),
)
trainer.train()
(row,) = [row for row in trainer.state.log_history if "reward" in row]
print(json.dumps({"reward": row["reward"], "groups": reward.counts["groups"], "failed": reward.counts["failed"]}))
