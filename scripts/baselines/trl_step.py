"""Whole GRPO steps of TRL's GRPOTrainer, timed: 8 prompts x 8 completions of exactly NEW tokens, full fine-tuning, no KL.

usage: trl_step.py MODEL bf16|f32 NEW THREADS      prints one line of JSON
"""
import json, os, resource, sys, tempfile, time

model, precision, new, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
os.environ.update(OMP_NUM_THREADS=str(threads), HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
import torch, trl
from datasets import Dataset
from transformers import TrainerCallback

torch.set_num_threads(threads)
rows = [{"prompt": [{"role": "user", "content": f"What is {i} + {i * 7 % 13}? Think step by step, then give the number."}]}
        for i in range(10, 50)]
ends = []


class Clock(TrainerCallback):
    def on_step_end(self, *_, **__):
        ends.append(time.perf_counter())


config = trl.GRPOConfig(
    output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=precision == "bf16", report_to=[], save_strategy="no", max_steps=2,
    learning_rate=1e-6, disable_tqdm=True, per_device_train_batch_size=16, gradient_accumulation_steps=4, num_generations=8,
    max_completion_length=new, temperature=1.0, top_k=0, top_p=1.0, beta=0.0, gradient_checkpointing=False,
    dataloader_pin_memory=False, model_init_kwargs={"dtype": torch.float32}, generation_kwargs={"min_new_tokens": new})
reward = lambda completions, **_: [float(len(c[0]["content"]) % 2) for c in completions]
trl.GRPOTrainer(model=model, args=config, reward_funcs=reward, train_dataset=Dataset.from_list(rows), callbacks=[Clock()]).train()
print(json.dumps({"seconds": ends[1] - ends[0], "trl": trl.__version__, "torch": torch.__version__,
                  "rss_peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}))
