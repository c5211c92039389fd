#!/usr/bin/env python3
"""rft-engine beside its peers on one machine in one run: llama.cpp (rollouts), torch (learner), TRL (whole step).

usage: side_by_side.py [--what rollout learner step] [--precision bf16] [--threads 2] [--minutes 10] [--out FILE]
VENV and MODELS are as for setup.sh; run `cargo build --release` first. Each pair is measured one right after the other, prints one
line with the ratio (above 1: rft-engine is faster), and the whole goes to benches/baselines/ as JSON with machine and flags.
llama.cpp's figures hold no sampling and no logprobs, rft-engine's hold both. `others` is how many cores other processes kept busy: above
0.15 the peers' spinning threads suffer and the ratio says little.
"""
import argparse, json, os, subprocess, time
from pathlib import Path

root = Path(__file__).resolve().parents[2]
ap = argparse.ArgumentParser()
ap.add_argument("--what", nargs="+", default=["rollout", "learner", "step"], choices=["rollout", "learner", "step"])
ap.add_argument("--precision", nargs="+", default=["bf16"], choices=["bf16", "f32"])
ap.add_argument("--threads", default=str(os.cpu_count()))
ap.add_argument("--minutes", type=float, default=10, help="starts no further pair after this long")
ap.add_argument("--out", help="default: benches/baselines/side_by_side-DATE.json")
ap.add_argument("--engine", default=str(root / os.environ.get("CARGO_TARGET_DIR", "target") / "release" / "rft-engine"))
a = ap.parse_args()
venv = os.path.abspath(os.environ.get("VENV", ".venv-baselines"))
models = os.path.abspath(os.environ.get("MODELS", "models"))
python, hf, here = f"{venv}/bin/python", f"{models}/smollm2-hf-f32", Path(__file__).parent
purelib = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
                         capture_output=True, text=True, check=True).stdout.strip()
begin, results, machine = time.time(), [], {}


def cpu_seconds():
    """(of everyone, of this process's finished children)"""
    busy = list(map(int, open("/proc/stat").readline().split()[1:9]))
    t = os.times()
    return (sum(busy) - busy[3] - busy[4]) / os.sysconf("SC_CLK_TCK"), t.children_user + t.children_system


def run(command, timeout=300):
    """JSON lines of a command, and how many cores others kept busy meanwhile."""
    before, start = cpu_seconds(), time.time()
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])}: {done.stderr.strip()[-300:]}")
    after = cpu_seconds()
    others = ((after[0] - before[0]) - (after[1] - before[1])) / (time.time() - start)
    return [json.loads(l) for l in done.stdout.splitlines() if l.startswith('{"')], round(max(0.0, others), 2)


def ours(*flags):
    lines, others = run([a.engine, "bench", *flags, "--model", hf, "--threads", a.threads, "--json"])
    machine.update(lines[0])
    return lines[1:], others


def pair(work, unit, our, peer, better, peer_name, others, **more):
    """better: +1 where more is better (tokens/s), -1 where less is (seconds)."""
    ratio = (our / peer) ** better
    results.append(dict(work=work, unit=unit, ours=our, peer=peer, peer_name=peer_name, ratio=round(ratio, 2), others=others, **more))
    print(f"{work:46} ours {our:8.1f}  {peer_name:22} {peer:8.1f} {unit:9} ratio {ratio:5.2f}  others {others}", flush=True)


def rollout(precision):
    gguf = f"{models}/smollm2-gguf/smollm2-135m-{precision.upper()}.gguf"
    for parallel in (8, 32, 64):
        for shared in (True, False):
            if over():
                return
            [mine], o1 = ours("rollout", "--precision", precision, "--parallel", str(parallel), "--group", "0" if shared else "1", "--repeats", "2")
            command = [f"{purelib}/bin/llama-batched-bench", "-m", gguf, "-c", str(parallel * 192), "-b", "2048", "-ub", "512", "-t", a.threads,
                       "-tb", a.threads, "-npp", "64", "-ntg", "128", "-npl", str(parallel), "--output-format", "jsonl"]
            [theirs], o2 = run(command + ["-pps"] * shared)
            pair(f"decode {precision} B={parallel} {'shared' if shared else 'separate'} prompt 64, new 128", "tokens/s", mine["value"],
                 theirs["speed_tg"], 1, "llama.cpp", [o1, o2], roofline_share=mine["roofline_share"],
                 prefill=[mine["prefill_tokens_per_s"], theirs["speed_pp"]])


def learner(precision):
    if over():
        return
    [mine], o1 = ours("learner", "--precision", precision, "--repeats", "2")
    [theirs], o2 = run([python, str(here / "torch_step.py"), hf, precision, "16", "64", "128", a.threads])
    pair(f"learner step {precision} full 16x(64+128)", "s", mine["seconds_per_update"], theirs["seconds"], -1, "torch " + theirs["torch"],
         [o1, o2], roofline_share=mine["roofline_share"], rss_peak_mb=[mine["rss_peak_mb"], theirs["rss_peak_mb"]])
    if over():
        return
    # A group of 8 with a long prompt: rft-engine computes the prompt once, torch once for each completion.
    [mine], o1 = ours("learner", "--precision", precision, "--sequences", "16", "--prompt", "256", "--new", "64", "--group", "8", "--repeats", "2")
    [theirs], o2 = run([python, str(here / "torch_step.py"), hf, precision, "16", "256", "64", a.threads])
    pair(f"learner step {precision} full 2 groups of 8, 256+64", "s", mine["seconds_per_update"], theirs["seconds"], -1,
         "torch " + theirs["torch"], [o1, o2], rss_peak_mb=[mine["rss_peak_mb"], theirs["rss_peak_mb"]])


def step(precision):
    if over():
        return
    [mine], o1 = ours("step", "--precision", precision, "--repeats", "2")
    [theirs], o2 = run([python, str(here / "trl_step.py"), hf, precision, "64", a.threads])
    pair(f"GRPO step {precision} 8x8, prompt 50, new 64", "s", mine["value"], theirs["seconds"], -1, "TRL " + theirs["trl"], [o1, o2],
         rss_peak_mb=[mine["rss_peak_mb"], theirs["rss_peak_mb"]], rollout_s=mine["rollout_s"], learner_s=mine["learner_s"])


def over():
    return time.time() - begin > 60 * a.minutes


for precision in a.precision:
    # The shortest first, so that a run that ends early has something of everything.
    for what in [w for w in (learner, step, rollout) if w.__name__ in a.what]:
        try:
            what(precision)
        except (RuntimeError, subprocess.TimeoutExpired, OSError) as error:
            print(f"{what.__name__} {precision}: {error}", flush=True)
out = Path(a.out or root / f"benches/baselines/side_by_side-{time.strftime('%Y-%m-%d-%H%M')}.json")
out.parent.mkdir(parents=True, exist_ok=True)
machine.pop("flags", None)
out.write_text(json.dumps({"date": time.strftime("%Y-%m-%d %H:%M"), "threads": a.threads, "machine": machine, "results": results}, indent=1) + "\n")
print(f"written to {out}", flush=True)
