//! A small fuzzer on stable Rust: seeded mutations, an allocator that counts, and limits that every input must keep.
//!
//! A target is a function of a seed. Seeds run from 0 until the budget ends (`RFT_FUZZ_SECONDS` a target, else two
//! seconds); a failure prints its seed and `RFT_FUZZ_SEED` runs that one alone. Two threads' allocations cannot be told
//! apart, so targets take turns.

use std::alloc::{GlobalAlloc, Layout, System};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Mutex, Once};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Counts live bytes and their peak.
pub struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn grow(by: usize) {
    let live = LIVE.fetch_add(by, SeqCst) + by;
    PEAK.fetch_max(live, SeqCst);
}

// SAFETY: every call goes to the system allocator unchanged; only counters are added.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), SeqCst);
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // the old and the new block may both live while the content moves
        grow(size);
        LIVE.fetch_sub(layout.size(), SeqCst);
        unsafe { System.realloc(at, layout, size) }
    }
}

/// What one input may take.
#[derive(Clone, Copy)]
pub struct Limits {
    /// Most bytes beyond those live before; the input's own length times four is added.
    pub bytes: usize,
    /// Longest processor time.
    pub time: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { bytes: 64 << 20, time: Duration::from_secs(2) }
    }
}

/// Processor time of this process: what others run meanwhile does not count. Wall-clock time where the system does not tell.
fn spent(start: Instant) -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // user and system time, in hundredths of a second, are the 12th and 13th field after the name
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    let ticks: Vec<u64> = fields.skip(11).take(2).filter_map(|t| t.parse().ok()).collect();
    match ticks[..] {
        [user, system] => Duration::from_millis(10 * (user + system)),
        _ => start.elapsed(),
    }
}

/// Runs `work` and gives its result, the bytes it took beyond what was live before, and its processor time.
pub fn measured<T>(work: impl FnOnce() -> T) -> (T, usize, Duration) {
    let before = LIVE.load(SeqCst);
    PEAK.store(before, SeqCst);
    let start = Instant::now();
    let before_time = spent(start);
    let out = work();
    (out, PEAK.load(SeqCst).saturating_sub(before), spent(start).saturating_sub(before_time))
}

static TURN: Mutex<()> = Mutex::new(());
/// Seed plus one of the input under way, 0 between inputs.
static UNDER_WAY: AtomicU64 = AtomicU64::new(0);

/// Takes turns with the other targets of this process.
pub fn alone() -> std::sync::MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Runs a target: `make` turns random numbers into an input, `read` must survive it; `read` says whether the input was
/// accepted, and a target of which nothing is ever accepted (or ever refused) tests little, so both are counted.
pub fn fuzz<I: AsRef<[u8]>>(
    name: &'static str,
    limits: Limits,
    mut make: impl FnMut(&mut Rng) -> I,
    mut read: impl FnMut(&I) -> bool,
) {
    let _turn = alone();
    watch();
    let number = |key: &str| std::env::var(key).ok().and_then(|v| v.parse::<u64>().ok());
    let only = number("RFT_FUZZ_SEED");
    let budget = Duration::from_secs(number("RFT_FUZZ_SECONDS").unwrap_or(2));
    let (start, mut seed) = (Instant::now(), only.unwrap_or(0));
    let (mut accepted, mut refused, mut most, mut longest) = (0u64, 0u64, 0, Duration::ZERO);
    loop {
        let input = make(&mut Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5eed));
        let length = input.as_ref().len();
        if only.is_some() {
            println!(
                "{name}: seed {seed}:\n{}",
                String::from_utf8_lossy(&input.as_ref()[..length.min(4000)])
            );
        }
        UNDER_WAY.store(seed + 1, SeqCst);
        let (result, bytes, time) = measured(|| catch_unwind(AssertUnwindSafe(|| read(&input))));
        UNDER_WAY.store(0, SeqCst);
        let shown = || String::from_utf8_lossy(&input.as_ref()[..length.min(400)]).into_owned();
        match result {
            Ok(true) => accepted += 1,
            Ok(false) => refused += 1,
            Err(_) => panic!("{name}: seed {seed} panics; input of {length} bytes begins: {}", shown()),
        }
        let bound = limits.bytes + 4 * length;
        assert!(bytes <= bound, "{name}: seed {seed} takes {bytes} of {bound} bytes; input: {}", shown());
        assert!(time <= limits.time, "{name}: seed {seed} takes {time:?}; input: {}", shown());
        (most, longest) = (most.max(bytes), longest.max(time));
        seed += 1;
        if only.is_some() || start.elapsed() >= budget {
            break;
        }
    }
    println!(
        "{name}: {} inputs, {accepted} accepted, {refused} refused; at most {:.1} MiB and {:.0} ms",
        accepted + refused,
        most as f64 / f64::from(1 << 20),
        longest.as_secs_f64() * 1e3
    );
    assert!(only.is_some() || (accepted > 0 && refused > 0), "{name} tests nothing: {accepted}, {refused}");
}

/// Ends the process when one input never ends, naming its seed.
fn watch() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        std::thread::spawn(|| {
            let (mut last, mut since) = (0, Instant::now());
            loop {
                std::thread::sleep(Duration::from_millis(500));
                let now = UNDER_WAY.load(SeqCst);
                if now != last || now == 0 {
                    (last, since) = (now, Instant::now());
                } else if since.elapsed() > Duration::from_secs(120) {
                    eprintln!("the input of seed {} does not end", now - 1);
                    std::process::abort();
                }
            }
        });
    });
}

/// SplitMix64 (Steele, Lea, Flood 2014).
pub struct Rng(pub u64);

impl Rng {
    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `n` (0 for 0).
    pub fn below(&mut self, n: usize) -> usize {
        if n == 0 { 0 } else { (self.bits() % n as u64) as usize }
    }

    /// One of them.
    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }

    /// True once in `n`.
    pub fn once_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    /// A number that breaks arithmetic: around 0, powers of two and the ends of types.
    pub fn hostile_number(&mut self) -> u64 {
        let base =
            *self.pick(&[0, 1, 7, 8, 31, 32, 33, 63, 0x7fff_ffff, 0xffff_ffff, u64::MAX >> 1, u64::MAX]);
        match self.below(3) {
            0 => base,
            1 => base.wrapping_add(self.below(3) as u64).wrapping_sub(1),
            _ => 1u64 << self.below(64),
        }
    }
}

/// Changes some bytes in front of `front` (all of them for a text): flips, numbers, cuts, repeats.
pub fn damage_bytes(rng: &mut Rng, bytes: &mut Vec<u8>, front: usize) {
    for _ in 0..=rng.below(4) {
        let at = rng.below(front.min(bytes.len()));
        match rng.below(7) {
            0 => bytes.truncate(at),
            1 if at < bytes.len() => bytes[at] ^= 1 << rng.below(8),
            2 if at < bytes.len() => bytes[at] = rng.bits() as u8,
            3 => {
                let number = rng.hostile_number().to_le_bytes();
                let width = *rng.pick(&[1, 2, 4, 8]);
                for (to, from) in bytes.iter_mut().skip(at).zip(&number[..width]) {
                    *to = *from;
                }
            }
            4 => {
                let end = (at + 1 + rng.below(16)).min(bytes.len());
                bytes.drain(at.min(end)..end);
            }
            5 => {
                let end = (at + 1 + rng.below(64)).min(bytes.len());
                let piece = bytes[at.min(end)..end].to_vec();
                let to = rng.below(bytes.len() + 1);
                bytes.splice(to..to, piece);
            }
            _ => {
                let piece: Vec<u8> = (0..1 + rng.below(8)).map(|_| rng.bits() as u8).collect();
                let to = at.min(bytes.len());
                bytes.splice(to..to, piece);
            }
        }
    }
}

/// Changes some values of a JSON tree: numbers, types, names, order, nesting.
pub fn damage_json(rng: &mut Rng, root: &mut Value) {
    for _ in 0..=rng.below(3) {
        let count = nodes(root);
        let mut at = rng.below(count);
        if let Some(node) = nth(root, &mut at) {
            change(rng, node);
        }
    }
}

fn nodes(value: &Value) -> usize {
    1 + match value {
        Value::Array(items) => items.iter().map(nodes).sum(),
        Value::Object(map) => map.values().map(nodes).sum(),
        _ => 0,
    }
}

fn nth<'a>(value: &'a mut Value, at: &mut usize) -> Option<&'a mut Value> {
    if *at == 0 {
        return Some(value);
    }
    *at -= 1;
    match value {
        Value::Array(items) => items.iter_mut().find_map(|v| nth(v, at)),
        Value::Object(map) => map.values_mut().find_map(|v| nth(v, at)),
        _ => None,
    }
}

fn change(rng: &mut Rng, node: &mut Value) {
    let choice = rng.below(12);
    match node {
        Value::Object(map) if choice < 7 && !map.is_empty() => {
            let key = map.keys().nth(rng.below(map.len())).cloned().unwrap_or_default();
            match choice {
                0..=2 => drop(map.shift_remove(&key)),
                3 | 4 => {
                    let value = map.shift_remove(&key).unwrap_or_default();
                    map.insert(format!("{key}{}", rng.pick(&["", "s", "\0", "é", "."])), value);
                }
                5 => {
                    let other = map.keys().nth(rng.below(map.len())).cloned().unwrap_or_default();
                    let value = map[&key].clone();
                    map.insert(other, value);
                }
                _ => drop(map.insert(rng.pick(&["type", "", "x", "weight"]).to_string(), hostile_value(rng))),
            }
        }
        Value::Array(items) if choice < 7 && !items.is_empty() => {
            let at = rng.below(items.len());
            match choice {
                0..=1 => drop(items.remove(at)),
                2 => items.swap(0, at),
                3 => items.truncate(at),
                4 => {
                    let copies = vec![items[at].clone(); 1 + rng.below(100)];
                    items.extend(copies);
                }
                _ => items[at] = hostile_value(rng),
            }
        }
        Value::String(text) if choice < 6 => match choice {
            0 => text.clear(),
            1 => *text = text.repeat(1 + rng.below(300)),
            2 => text.push_str(rng.pick::<&str>(&["\0", "\u{FFFD}", "é", "/../x", "{{", " ", "\n", "▁"])),
            _ => {
                let keep = rng.below(text.chars().count() + 1);
                *text = text.chars().take(keep).collect();
            }
        },
        Value::Number(n) if choice < 8 => {
            let near = n.as_i64().unwrap_or(0);
            *node = match choice {
                0 => json!(near.wrapping_add(1)),
                1 => json!(near.wrapping_sub(1)),
                2 => json!(near.wrapping_neg()),
                3 => json!(near as f64 + 0.5),
                4 => json!(1e308),
                _ => json!(rng.hostile_number()),
            };
        }
        _ => *node = hostile_value(rng),
    }
}

fn hostile_value(rng: &mut Rng) -> Value {
    match rng.below(12) {
        0 => Value::Null,
        1 => json!(rng.once_in(2)),
        2 => json!([]),
        3 => json!({}),
        4 => json!(""),
        5 => json!("x".repeat(1 + rng.below(10_000))),
        6 => (0..1 + rng.below(120)).fold(json!(1), |inner, _| json!([inner])),
        7 => (0..1 + rng.below(120)).fold(json!(1), |inner, _| json!({"a": inner})),
        8 => json!(-1),
        9 => json!(1e-308),
        10 => json!(vec![0; rng.below(1000)]),
        _ => json!(rng.hostile_number()),
    }
}

/// Changes some words of a text: repeats, drops, swaps, foreign words, single characters.
pub fn damage_words(rng: &mut Rng, text: &str, foreign: &[&str]) -> String {
    let mut words: Vec<String> =
        text.split_inclusive([' ', '\n', '=', '.', ',', '}']).map(String::from).collect();
    for _ in 0..=rng.below(4) {
        let (a, b) = (rng.below(words.len()), rng.below(words.len()));
        match rng.below(7) {
            0 if !words.is_empty() => drop(words.remove(a)),
            1 if !words.is_empty() => words.swap(a, b),
            2 if !words.is_empty() => words.insert(b, words[a].clone()),
            3 => words.insert(a, rng.pick(foreign).to_string()),
            4 if !words.is_empty() => words[a] = rng.pick(foreign).to_string(),
            5 => words.truncate(a + 1),
            _ if !words.is_empty() => {
                let keep = rng.below(words[a].chars().count() + 1);
                words[a] = words[a].chars().take(keep).collect();
            }
            _ => {}
        }
    }
    words.concat()
}
