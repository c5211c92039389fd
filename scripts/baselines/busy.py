#!/usr/bin/env python3
"""Rollouts and learner steps while another process keeps one core busy, against the same on an idle machine.

usage: busy.py [--model FOLDER] [--what rollout learner] [--precision bf16] [--threads 2] [--rounds 3] [--core 1] [--out FILE]
Run `cargo build --release` first. Rounds alternate idle and busy; each case's best round counts, and one line a case gives the ratio of the
two. `others` is how many cores processes beside rft-engine and the busy loop kept busy: above 0.15 the ratio says little.
"""
import argparse, json, os, subprocess, sys, time
from pathlib import Path

root = Path(__file__).resolve().parents[2]
ap = argparse.ArgumentParser()
ap.add_argument("--what", nargs="+", default=["rollout", "learner"], choices=["rollout", "learner"])
ap.add_argument("--precision", default="bf16", choices=["bf16", "f32"])
ap.add_argument("--threads", default=str(os.cpu_count()))
ap.add_argument("--rounds", type=int, default=3)
ap.add_argument("--core", type=int, default=os.cpu_count() - 1, help="the core that the other process keeps busy")
ap.add_argument("--model", help="Hugging Face folder or GGUF file [default: random weights of SmolLM2-135M's shape]")
ap.add_argument("--out", help="writes the results as JSON")
ap.add_argument("--engine", default=str(root / os.environ.get("CARGO_TARGET_DIR", "target") / "release" / "rft-engine"))
a = ap.parse_args()
flags = {"rollout": ["--parallel", "8,32,64", "--new", "64", "--repeats", "1"], "learner": ["--sequences", "8", "--repeats", "2"]}


def cpu_seconds():
    """(of everyone, of this process's finished children)"""
    busy = list(map(int, open("/proc/stat").readline().split()[1:9]))
    t = os.times()
    return (sum(busy) - busy[3] - busy[4]) / os.sysconf("SC_CLK_TCK"), t.children_user + t.children_system


def measure(what, busy):
    """Best tokens/s of each case by name, and how many cores others kept busy."""
    loop = None
    before, start = cpu_seconds(), time.time()
    if busy:
        pin = f"import os\nos.sched_setaffinity(0, {{{a.core}}})\nwhile True: pass"
        loop = subprocess.Popen([sys.executable, "-c", pin])
    try:
        model = ["--model", a.model] if a.model else []
        command = [a.engine, "bench", what, *flags[what], *model, "--precision", a.precision, "--threads", a.threads, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    finally:
        if loop:
            loop.kill()
            loop.wait()
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip()[-300:]}")
    after = cpu_seconds()
    others = ((after[0] - before[0]) - (after[1] - before[1])) / (time.time() - start)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
    return {line["work"]: line["max"] for line in lines[1:]}, round(max(0.0, others), 2)


best, others = {}, {}
for _ in range(a.rounds):
    for what in a.what:
        for busy in (False, True):
            found, rest = measure(what, busy)
            others[busy] = max(others.get(busy, 0.0), rest)
            for work, value in found.items():
                key = (work, busy)
                best[key] = max(best.get(key, 0.0), value)
results = []
for work in dict.fromkeys(work for work, _ in best):
    idle, loaded = best[work, False], best[work, True]
    results.append(dict(work=work, unit="tokens/s", idle=idle, busy=loaded, ratio=round(loaded / idle, 2)))
    print(f"{work:56} idle {idle:8.1f}  core {a.core} busy {loaded:8.1f} tokens/s  ratio {loaded / idle:5.2f}", flush=True)
print(f"others kept at most {others[False]} (idle) and {others[True]} (busy) of a core", flush=True)
if a.out:
    about = {"date": time.strftime("%Y-%m-%d %H:%M"), "threads": a.threads, "core": a.core, "others": [others[False], others[True]]}
    Path(a.out).write_text(json.dumps({**about, "results": results}, indent=1) + "\n")
