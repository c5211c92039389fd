//! What a call may still use and its random numbers: state that the VM's callbacks share.

use std::cell::Cell;
use std::time::{Duration, Instant};

use crate::types::{ErrorKind, Limits};

/// Interrupts between two looks at the clock; a turn of a loop may cost milliseconds (a long string), so few.
const CLOCK_EVERY: u64 = 16;
/// Characters that a call may print.
const MAX_PRINTED: usize = 4096;

/// The budget of the running call.
#[derive(Debug)]
pub(crate) struct Budget {
    deadline: Cell<Instant>,
    steps: Cell<u64>,
    max_steps: Cell<u64>,
    tripped: Cell<Option<ErrorKind>>,
    line: Cell<Option<u32>>,
    random: Cell<u64>,
    printed: Cell<usize>,
}

impl Budget {
    pub(crate) fn new() -> Budget {
        Budget {
            deadline: Cell::new(Instant::now()),
            steps: Cell::new(0),
            max_steps: Cell::new(0),
            tripped: Cell::new(None),
            line: Cell::new(None),
            random: Cell::new(0),
            printed: Cell::new(0),
        }
    }

    /// Starts a call.
    pub(crate) fn start(&self, limits: &Limits, random_key: u64) {
        self.deadline.set(Instant::now() + Duration::from_millis(limits.time_ms));
        self.steps.set(0);
        self.max_steps.set(limits.instructions.unwrap_or(u64::MAX));
        self.tripped.set(None);
        self.line.set(None);
        self.random.set(random_key);
        self.printed.set(0);
    }

    /// Counts `steps`; the kind of the limit that has been passed, if any. Once tripped it stays so until the next call.
    pub(crate) fn charge(&self, steps: u64) -> Option<ErrorKind> {
        if let Some(kind) = self.tripped.get() {
            return Some(kind);
        }
        let before = self.steps.get();
        let after = before.saturating_add(steps);
        self.steps.set(after);
        if after > self.max_steps.get() {
            self.tripped.set(Some(ErrorKind::Instructions));
        } else if before / CLOCK_EVERY != after / CLOCK_EVERY && Instant::now() >= self.deadline.get() {
            self.tripped.set(Some(ErrorKind::Timeout));
        }
        self.tripped.get()
    }

    pub(crate) fn tripped(&self) -> Option<ErrorKind> {
        self.tripped.get()
    }

    pub(crate) fn line(&self) -> Option<u32> {
        self.line.get()
    }

    pub(crate) fn set_line(&self, line: Option<u32>) {
        if self.line.get().is_none() {
            self.line.set(line);
        }
    }

    pub(crate) fn steps(&self) -> u64 {
        self.steps.get()
    }

    /// Time and steps that are left.
    pub(crate) fn left(&self) -> (Duration, u64) {
        let time = self.deadline.get().saturating_duration_since(Instant::now());
        (time, self.max_steps.get().saturating_sub(self.steps.get()))
    }

    pub(crate) fn reseed(&self, key: u64) {
        self.random.set(mix(self.random.get() ^ mix(key)));
    }

    /// The next 64 random bits.
    pub(crate) fn random(&self) -> u64 {
        let next = self.random.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.random.set(next);
        mix(next)
    }

    /// Cuts a printed line to what the call may still print; `None` when that is nothing.
    pub(crate) fn printable(&self, mut line: String) -> Option<String> {
        let room = MAX_PRINTED.saturating_sub(self.printed.get());
        if room == 0 {
            return None;
        }
        if line.len() > room {
            let cut = (0..=room).rev().find(|at| line.is_char_boundary(*at)).unwrap_or(0);
            line.truncate(cut);
            line.push('…');
        }
        self.printed.set(self.printed.get() + line.len() + 1);
        Some(line)
    }
}

/// splitmix64's finaliser: a bijection of 64 bits.
fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Key of a call's random numbers: a function of its arguments alone.
pub(crate) fn random_key(seed: u64, step: u64, script: &str, row: &str, sample: u64) -> u64 {
    let text = |text: &str| {
        text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
    };
    [seed, step, text(script), text(row), sample].into_iter().fold(0, |key, part| mix(key ^ mix(part)))
}
