//! The worker pool.

use std::hint::black_box;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rft_kernels::Pool;

#[test]
fn every_item_is_done_once() {
    for threads in [1, 2, 3, 8] {
        let pool = Pool::new(threads);
        assert_eq!(pool.threads(), threads);
        for items in [0, 1, 2, 7, 100] {
            for _ in 0..50 {
                let counts: Vec<AtomicUsize> = (0..items).map(|_| AtomicUsize::new(0)).collect();
                pool.run(items, |i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
            }
        }
    }
}

#[test]
fn a_panic_is_passed_on_and_the_pool_lives() {
    let pool = Pool::new(3);
    let result = catch_unwind(AssertUnwindSafe(|| pool.run(10, |i| assert!(i != 5, "item 5"))));
    assert!(result.is_err());
    let done = AtomicUsize::new(0);
    pool.run(10, |_| {
        done.fetch_add(1, Ordering::Relaxed);
    });
    assert_eq!(done.into_inner(), 10);
}

#[test]
fn a_run_inside_an_item_and_from_two_threads_ends() {
    let pool = Pool::new(2);
    let done = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                for _ in 0..100 {
                    pool.run(4, |_| pool.run(3, |_| _ = done.fetch_add(1, Ordering::Relaxed)));
                }
            });
        }
    });
    assert_eq!(done.into_inner(), 2 * 100 * 4 * 3);
}

/// Time of many short jobs, as a decoding pass has them: about 0.1 s of one thread in all.
fn short_jobs(pool: &Pool) -> Duration {
    let start = Instant::now();
    for _ in 0..400 {
        pool.run(12, |i| _ = black_box((0..20_000u64).fold(i as u64, |a, b| black_box(a ^ b))));
    }
    start.elapsed()
}

#[test]
fn a_crowd_of_threads_or_a_busy_core_slows_short_jobs_little() {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let (one, all, crowd) = (Pool::new(1), Pool::new(cores), Pool::new(4 * cores));
    let spinning = AtomicBool::new(false);
    let over = AtomicBool::new(false);
    let mut best = [Duration::MAX; 3];
    std::thread::scope(|scope| {
        // another program's thread: it computes whenever it may
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                if spinning.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                } else {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        });
        for _ in 0..5 {
            best[0] = best[0].min(short_jobs(&one));
            best[1] = best[1].min(short_jobs(&crowd));
            spinning.store(true, Ordering::Relaxed);
            best[2] = best[2].min(short_jobs(&all));
            spinning.store(false, Ordering::Relaxed);
        }
        over.store(true, Ordering::Relaxed);
    });
    println!("one thread, four a core, one a core beside a busy one: {best:?}");
    // a barrier that waits for a thread without a core costs a time slice a job: twenty times as much
    assert!(best[1] < 3 * best[0] && best[2] < 3 * best[0], "{best:?}");
}

#[test]
fn the_roofline_is_measured_in_finite_positive_numbers() {
    let roof = rft_kernels::roofline(&Pool::new(2));
    assert_eq!(roof.threads, 2);
    for rate in [roof.f32_gflops, roof.bf16_gflops, roof.read_gb_per_s] {
        assert!(rate.is_finite() && rate > 0.0, "{roof:?}");
    }
    println!("{roof:?}");
}
