//! The worker pool.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};

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

#[test]
fn the_roofline_is_measured_in_finite_positive_numbers() {
    let roof = rft_kernels::roofline(&Pool::new(2));
    assert_eq!(roof.threads, 2);
    for rate in [roof.f32_gflops, roof.bf16_gflops, roof.read_gb_per_s] {
        assert!(rate.is_finite() && rate > 0.0, "{roof:?}");
    }
    println!("{roof:?}");
}
