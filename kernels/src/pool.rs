//! Persistent worker threads that share numbered work items.
//!
//! A job is open while items remain; a worker that wakes late finds it closed and goes back to sleep, so nobody waits for a
//! thread that the system has not scheduled. Items are handed out by an atomic counter. Workers spin for a moment, then park.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::shared::Shared;

/// How long an idle thread watches for work before it parks: about the gap between two kernels of a decode step.
const SPIN: Duration = Duration::from_micros(30);

const INSIDE: u64 = 0xffff;
const OPEN: u64 = 1 << 16;
const EPOCH: u32 = 17;

/// Worker threads; the thread that calls [`Pool::run`] takes part.
pub struct Pool {
    shared: Arc<State>,
    turn: Mutex<()>,
    workers: Vec<JoinHandle<()>>,
}

struct Job<'a> {
    work: &'a (dyn Fn(usize) + Sync),
    items: usize,
    next: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

struct State {
    /// epoch << 17 | open << 16 | workers inside the job
    gate: AtomicU64,
    job: AtomicPtr<Job<'static>>,
    sleepers: AtomicUsize,
    caller_sleeps: AtomicUsize,
    stop: AtomicUsize,
    lock: Mutex<()>,
    wake: Condvar,
    done: Condvar,
}

thread_local! {
    static INSIDE_A_JOB: Cell<bool> = const { Cell::new(false) };
}

impl Pool {
    /// A pool of `threads` threads in all (at least one), the caller's own included.
    pub fn new(threads: usize) -> Pool {
        let shared = Arc::new(State {
            gate: AtomicU64::new(0),
            job: AtomicPtr::new(std::ptr::null_mut()),
            sleepers: AtomicUsize::new(0),
            caller_sleeps: AtomicUsize::new(0),
            stop: AtomicUsize::new(0),
            lock: Mutex::new(()),
            wake: Condvar::new(),
            done: Condvar::new(),
        });
        let workers = (1..threads.max(1))
            .map(|i| {
                let shared = shared.clone();
                std::thread::Builder::new()
                    .name(format!("rft-kernel-{i}"))
                    .spawn(move || shared.work())
                    .expect("the system refuses a thread")
            })
            .collect();
        Pool { shared, turn: Mutex::new(()), workers }
    }

    /// Threads in all.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `f(0)`, `f(1)` … `f(items - 1)`, each once, on any thread in any order, and returns when all are done.
    ///
    /// A panic in `f` is passed on after the other threads have left. A call from inside `f` runs its items in place.
    pub fn run(&self, items: usize, f: impl Fn(usize) + Sync) {
        if items == 0 {
            return;
        }
        if items == 1 || self.workers.is_empty() || INSIDE_A_JOB.get() {
            (0..items).for_each(f);
            return;
        }
        let turn = self.turn.lock().unwrap_or_else(|e| e.into_inner());
        let job = Job { work: &f, items, next: AtomicUsize::new(0), panic: Mutex::new(None) };
        self.shared.open(&job);
        job.drain();
        self.shared.close();
        drop(turn);
        let panic = job.panic.lock().unwrap_or_else(|e| e.into_inner()).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// Calls `f(i, chunk)` for each `width`-long chunk of `data` and gives the results in order; allocates for them alone.
    pub fn map_chunks<T: Send, R: Send>(
        &self,
        data: &mut [T],
        width: usize,
        f: impl Fn(usize, &mut [T]) -> R + Sync,
    ) -> Vec<R> {
        let mut results = Vec::with_capacity(data.len() / width.max(1));
        let slots = Shared::new(results.spare_capacity_mut());
        let items = self.chunks(data, width, |i, chunk| {
            // SAFETY: item i alone touches result i.
            _ = unsafe { slots.part(i, 1) }[0].write(f(i, chunk));
        });
        // SAFETY: every item has written its result; after a panic, which is passed on, none is read.
        unsafe { results.set_len(items) };
        results
    }

    /// As [`Pool::map_chunks`], with the results in `results`, one a chunk.
    pub fn map_chunks_into<T: Send, R: Send>(
        &self,
        data: &mut [T],
        width: usize,
        results: &mut [R],
        f: impl Fn(usize, &mut [T]) -> R + Sync,
    ) {
        assert_eq!(results.len() * width, data.len(), "one result a chunk of {width}");
        let slots = Shared::new(results);
        // SAFETY: item i alone touches result i.
        self.chunks(data, width, |i, chunk| unsafe { slots.part(i, 1) }[0] = f(i, chunk));
    }

    /// Calls `f(i, chunk)` for each chunk; their number.
    fn chunks<T: Send>(&self, data: &mut [T], width: usize, f: impl Fn(usize, &mut [T]) + Sync) -> usize {
        assert!(
            width > 0 && data.len().is_multiple_of(width),
            "{} elements in chunks of {width}",
            data.len()
        );
        let items = data.len() / width;
        let chunks = Shared::new(data);
        // SAFETY: item i alone touches chunk i.
        self.run(items, |i| f(i, unsafe { chunks.part(i * width, width) }));
        items
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(1, Ordering::SeqCst);
        drop(self.shared.hold());
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            // A worker catches the panics of its items, so it ends cleanly.
            let _ = worker.join();
        }
    }
}

impl Job<'_> {
    /// Takes items until none is left.
    fn drain(&self) {
        INSIDE_A_JOB.set(true);
        let result = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let item = self.next.fetch_add(1, Ordering::Relaxed);
                if item >= self.items {
                    break;
                }
                (self.work)(item);
            }
        }));
        INSIDE_A_JOB.set(false);
        if let Err(panic) = result {
            self.next.store(self.items, Ordering::Relaxed);
            self.panic.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(panic);
        }
    }
}

impl State {
    fn hold(&self) -> MutexGuard<'_, ()> {
        self.lock.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn open(&self, job: &Job<'_>) {
        self.job.store(std::ptr::from_ref(job).cast_mut().cast(), Ordering::Relaxed);
        let epoch = (self.gate.load(Ordering::Relaxed) >> EPOCH) + 1;
        self.gate.store(epoch << EPOCH | OPEN, Ordering::SeqCst);
        let sleepers = self.sleepers.load(Ordering::SeqCst);
        if sleepers > 0 {
            drop(self.hold());
            // no more than there is work for: a crowd that wakes for nothing fights over the lock
            if job.items > sleepers {
                self.wake.notify_all();
            } else {
                (1..job.items).for_each(|_| self.wake.notify_one());
            }
        }
    }

    /// Closes the job and waits for the workers that are inside it.
    fn close(&self) {
        let mut gate = self.gate.fetch_and(!OPEN, Ordering::SeqCst);
        let start = Instant::now();
        while gate & INSIDE != 0 && start.elapsed() < SPIN {
            std::hint::spin_loop();
            gate = self.gate.load(Ordering::SeqCst);
        }
        if gate & INSIDE == 0 {
            return;
        }
        let mut guard = self.hold();
        self.caller_sleeps.store(1, Ordering::SeqCst);
        while self.gate.load(Ordering::SeqCst) & INSIDE != 0 {
            guard = self.done.wait(guard).unwrap_or_else(|e| e.into_inner());
        }
        self.caller_sleeps.store(0, Ordering::SeqCst);
    }

    /// A worker's life.
    fn work(&self) {
        let mut seen = 0;
        while let Some(epoch) = self.enter(seen) {
            seen = epoch;
            // SAFETY: the job lives until `close` has seen that no worker is inside, and this worker is.
            let job = unsafe { &*self.job.load(Ordering::Relaxed) };
            job.drain();
            let gate = self.gate.fetch_sub(1, Ordering::SeqCst) - 1;
            if gate & (OPEN | INSIDE) == 0 && self.caller_sleeps.load(Ordering::SeqCst) > 0 {
                drop(self.hold());
                self.done.notify_all();
            }
        }
    }

    /// Waits for an open job later than `seen` and steps inside; `None` when the pool ends.
    fn enter(&self, seen: u64) -> Option<u64> {
        let start = Instant::now();
        loop {
            if let Some(epoch) = self.try_enter(seen) {
                return Some(epoch);
            }
            if self.stop.load(Ordering::SeqCst) != 0 {
                return None;
            }
            if start.elapsed() < SPIN {
                std::hint::spin_loop();
                continue;
            }
            let guard = self.hold();
            self.sleepers.fetch_add(1, Ordering::SeqCst);
            let gate = self.gate.load(Ordering::SeqCst);
            if (gate & OPEN == 0 || gate >> EPOCH == seen) && self.stop.load(Ordering::SeqCst) == 0 {
                drop(self.wake.wait(guard).unwrap_or_else(|e| e.into_inner()));
            }
            self.sleepers.fetch_sub(1, Ordering::SeqCst);
        }
    }

    fn try_enter(&self, seen: u64) -> Option<u64> {
        let mut gate = self.gate.load(Ordering::SeqCst);
        while gate & OPEN != 0 && gate >> EPOCH != seen {
            match self.gate.compare_exchange_weak(gate, gate + 1, Ordering::SeqCst, Ordering::SeqCst) {
                Ok(_) => return Some(gate >> EPOCH),
                Err(now) => gate = now,
            }
        }
        None
    }
}
