"""One learner step in plain torch, timed: GRPO's clipped loss, backward, clipping, AdamW, without gradient checkpointing.

usage: torch_step.py MODEL bf16|f32 SEQUENCES PROMPT NEW THREADS      prints one line of JSON
"""
import json, os, resource, sys, time

model, precision, threads = sys.argv[1], sys.argv[2], int(sys.argv[6])
sequences, prompt, new = map(int, sys.argv[3:6])
os.environ.update(OMP_NUM_THREADS=str(threads), HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
import torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(threads)
torch.manual_seed(0)
policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train()
optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, weight_decay=0.0)
MICRO = 8


def step(ids, advantage):
    for i in range(0, len(ids), MICRO):
        part, a = ids[i : i + MICRO], advantage[i : i + MICRO]
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = policy(input_ids=part, logits_to_keep=new + 1, use_cache=False).logits[:, :-1]
        targets = part[:, -new:]
        nll = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        logp = -nll.view(targets.shape)
        ratio = (logp - logp.detach()).exp()
        (-torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a).sum() / (len(ids) * new)).backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


batch = lambda n: (torch.randint(5, 49000, (n, prompt + new)), torch.randn(n, 1))
step(*batch(MICRO))
seconds = []
for _ in range(2):
    data, start = batch(sequences), time.perf_counter()
    step(*data)
    seconds.append(time.perf_counter() - start)
print(json.dumps({"seconds": min(seconds), "all_seconds": seconds, "torch": torch.__version__,
                  "rss_peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}))
