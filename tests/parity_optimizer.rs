//! Learning-rate schedules and AdamW trajectories against recorded runs of transformers and torch.

#[path = "support/golden.rs"]
mod golden;

#[path = "support/schedules.rs"]
mod schedules;

use golden::{Tally, Tensors, json, number, numbers, optional};
use rft_engine::learner::schedule::learning_rate;
use rft_kernels::{AdamwStep, Pool, adamw, sum_of_squares};
use schedules::schedule;

#[test]
fn parity_optimizer_schedules() {
    let file = json("optimizer/adamw.json");
    let mut t = Tally::new("adamw.json: learning-rate schedules");
    for (i, c) in file["schedules"].as_array().unwrap().iter().enumerate() {
        let (name, peak) = (c["name"].as_str().unwrap(), number(&c["base_lr"]));
        t.case(format!("{i} {name} {}", c["kwargs"]));
        let (kind, total, warmup) =
            schedule(name, &c["kwargs"], peak, number(&c["total"]) as u64, number(&c["warmup"]) as u64);
        let want = numbers(&c["lr_at_step"]);
        let got: Vec<f64> =
            (0..want.len()).map(|u| learning_rate(kind, peak, u as u64, total, warmup)).collect();
        t.values("rate", &got, &want, 0.0, 1e-12);
    }
    t.finish();
}

#[test]
fn parity_optimizer_adamw() {
    let (file, tensors) = (json("optimizer/adamw.json"), Tensors::open("optimizer/adamw.safetensors"));
    let pool = Pool::new(1);
    let steps = number(&file["steps"]) as usize;
    let mut t = Tally::new("adamw.json: trajectories of parameters, moments, norms and rates");
    for c in file["cases"].as_array().unwrap() {
        let id = c["id"].as_str().unwrap();
        t.case(id);
        let get = |p: &str, k: &str| tensors.get(&format!("{id}.{p}.{k}"));
        let (peak, betas) = (number(&c["lr"]), numbers(&c["betas"]));
        let warmup = number(&c["warmup"]) as u64;
        let (kind, total, warmup) =
            schedule(c["schedule"].as_str().unwrap(), &c["schedule_kwargs"], peak, steps as u64, warmup);
        let rates = numbers(&c["lr_used_at_step"]);
        let norms = numbers(&c["grad_norm_before_clip"]);
        let mut state: Vec<_> = ["w", "b"]
            .into_iter()
            .map(|p| {
                let init = get(p, "init").data.clone();
                let zero = vec![0.0; init.len()];
                (p, init, zero.clone(), zero)
            })
            .collect();
        for step in 0..steps {
            let grad = |p: &str, n: usize| get(p, "grads").data[step * n..(step + 1) * n].to_vec();
            let squares: f64 = state.iter().map(|(p, w, ..)| sum_of_squares(&pool, &grad(p, w.len()))).sum();
            t.value("norm", squares.sqrt(), norms[step], 1e-4, 2e-6);
            let scale = optional(&c["max_norm"]).map_or(1.0, |m| (m / (squares.sqrt() + 1e-6)).min(1.0));
            let lr = learning_rate(kind, peak, step as u64, total, warmup);
            t.value("rate", lr, rates[step], 0.0, 1e-12);
            for (p, w, m, v) in &mut state {
                let n = w.len();
                adamw(
                    &pool,
                    w,
                    &grad(p, n),
                    m,
                    v,
                    &AdamwStep {
                        lr: lr as f32,
                        beta1: betas[0] as f32,
                        beta2: betas[1] as f32,
                        eps: number(&c["eps"]) as f32,
                        weight_decay: if *p == "w" { number(&c["weight_decay"]) as f32 } else { 0.0 },
                        step: step as u64 + 1,
                        grad_scale: scale as f32,
                    },
                );
                t.values("parameter", w, &get(p, "after").data[step * n..(step + 1) * n], 1e-4, 2e-6);
            }
        }
        for (p, _, m, v) in &state {
            t.values("first moment", m, &get(p, "exp_avg").data, 1e-4, 2e-6);
            t.values("second moment", v, &get(p, "exp_avg_sq").data, 1e-4, 2e-6);
        }
    }
    t.finish();
}
