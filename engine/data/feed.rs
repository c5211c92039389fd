//! The feed: which row of which task comes next, from a cursor of a few counts.
//!
//! Each task has an endless order of its rows, a fresh shuffle an epoch. A step walks along it and takes the rows that
//! are admitted: not dropped by the filter, and wanted by the curriculum at this point. What comes next is a
//! function of (seed, cursor, rates, dropped rows), all of it in the checkpoint, so a resumed run skips and repeats nothing.

use std::collections::BTreeMap;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::data::prompts::Order;
use crate::rng::{Purpose, Stream};

/// Which prompts come when.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Curriculum {
    /// From easy to hard by a number in each row, over and over.
    Sorted {
        /// The row's field; higher is harder.
        column: String,
    },
    /// The easiest share of the rows at first, all of them in the end (baby steps, Bengio et al. 2009, "Curriculum learning").
    Widening {
        /// The row's field; higher is harder.
        column: String,
        /// Share of the rows at the start of a stage.
        #[serde(default = "default_start")]
        start: f64,
        /// Share of the stage's steps after which every row may come.
        #[serde(default = "default_by")]
        by: f64,
    },
    /// Rows near a wanted pass rate, as their own rollouts measured it; rows that were never tried come as they stand.
    PassRate {
        /// Wanted mean reward, as a share of the full reward.
        #[serde(default = "default_target")]
        target: f64,
        /// Distance from the target at which a row comes 0.61 (e^-1/2) times as often as one on it.
        #[serde(default = "default_width")]
        width: f64,
        /// Share of the old estimate in the new one, an exponential moving average.
        #[serde(default = "default_decay")]
        decay: f64,
        /// Least chance that a row is taken when its turn comes, so that no estimate grows stale for ever.
        #[serde(default = "default_floor")]
        floor: f64,
    },
}

fn default_start() -> f64 {
    0.2
}

fn default_by() -> f64 {
    0.5
}

fn default_target() -> f64 {
    0.5
}

fn default_width() -> f64 {
    0.2
}

fn default_decay() -> f64 {
    0.5
}

fn default_floor() -> f64 {
    0.05
}

impl Curriculum {
    /// The row's field that says how hard it is.
    pub fn column(&self) -> Option<&str> {
        match self {
            Self::Sorted { column } | Self::Widening { column, .. } => Some(column),
            Self::PassRate { .. } => None,
        }
    }

    /// What is wrong with the settings, and the remedy.
    ///
    /// # Errors
    /// A share that is none.
    pub fn check(&self) -> std::result::Result<(), String> {
        let share = |name: &str, x: f64, least: f64| match x >= least && x <= 1.0 {
            true => Ok(()),
            false => Err(format!("{name} must be between {least} and 1, got {x}")),
        };
        match *self {
            Self::Sorted { .. } => Ok(()),
            Self::Widening { start, by, .. } => share("start", start, 0.0).and(share("by", by, 0.0)),
            Self::PassRate { target, width, decay, floor } => {
                share("target", target, 0.0)?;
                share("decay", decay, 0.0)?;
                share("floor", floor, 0.001)?;
                match width > 0.0 && width.is_finite() {
                    true => Ok(()),
                    false => Err(format!("width must be positive, got {width}")),
                }
            }
        }
    }
}

/// Where a feed stands.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// Next position in the order of each task.
    pub position: Vec<u64>,
    /// Rows that each task has given in this stage.
    pub served: Vec<u64>,
}

/// What the feed of a step depends on beside its cursor.
#[derive(Debug, Clone, Copy)]
pub struct Now<'a> {
    /// Weight of each task; 0 leaves it out.
    pub weights: &'a [f64],
    /// Share of the stage's steps that are done.
    pub progress: f64,
    /// The curriculum.
    pub curriculum: Option<&'a Curriculum>,
    /// Measured mean reward by row, as a share of the full one.
    pub rates: &'a BTreeMap<usize, f32>,
}

#[derive(Debug)]
struct TaskOrder {
    rows: Range<usize>,
    order: Order,
    /// Rows from easy to hard, and each row's place among them; empty without a column.
    sorted: Vec<usize>,
    rank: Vec<usize>,
}

/// The orders of all tasks; rows are numbered through the tasks.
#[derive(Debug)]
pub struct Feed {
    seed: u64,
    tasks: Vec<TaskOrder>,
}

impl Feed {
    /// The feed of tasks whose rows are `tasks`, with the difficulty of every row where a curriculum has a column.
    pub fn new(seed: u64, tasks: &[Range<usize>], difficulty: Option<&[f64]>) -> Self {
        let order = |(t, rows): (usize, &Range<usize>)| {
            let own =
                if t == 0 { seed } else { Stream::new(seed, Purpose::Shuffle, &[u64::MAX, t as u64]).at(0) };
            let mut sorted: Vec<usize> = Vec::new();
            let mut rank = Vec::new();
            if let Some(difficulty) = difficulty {
                sorted = (0..rows.len()).collect();
                sorted.sort_by(|&a, &b| difficulty[rows.start + a].total_cmp(&difficulty[rows.start + b]));
                rank = vec![0; rows.len()];
                sorted.iter().enumerate().for_each(|(place, &row)| rank[row] = place);
            }
            TaskOrder { rows: rows.clone(), order: Order::new(own, rows.len()), sorted, rank }
        };
        Self { seed, tasks: tasks.iter().enumerate().map(order).collect() }
    }

    /// The task of `row`.
    pub fn task_of(&self, row: usize) -> usize {
        self.tasks.iter().position(|t| t.rows.contains(&row)).unwrap_or_default()
    }

    /// The next row that is not `dropped`, and moves the cursor past it; `Err` is a task of which all rows are dropped.
    ///
    /// # Errors
    /// The number of the task that has nothing left to give.
    pub fn next(
        &mut self,
        cursor: &mut Cursor,
        now: &Now,
        dropped: &dyn Fn(usize) -> bool,
    ) -> std::result::Result<usize, usize> {
        cursor.position.resize(self.tasks.len(), 0);
        cursor.served.resize(self.tasks.len(), 0);
        let t = furthest_behind(now.weights, &cursor.served);
        let task = &mut self.tasks[t];
        let mut spare = None;
        // an epoch in which the curriculum wants nothing ends with the first row that may come at all
        for _ in 0..=task.rows.len() {
            let position = cursor.position[t];
            cursor.position[t] += 1;
            let own = match now.curriculum {
                Some(Curriculum::Sorted { .. }) => {
                    task.sorted[(position % task.sorted.len() as u64) as usize]
                }
                _ => task.order.at(position),
            };
            let row = task.rows.start + own;
            if dropped(row) {
                continue;
            }
            spare = spare.or(Some(row));
            if wanted(self.seed, task, t, own, position, now) {
                cursor.served[t] += 1;
                return Ok(row);
            }
        }
        cursor.served[t] += 1;
        spare.ok_or(t)
    }
}

/// The task that has given least of its share: after every draw, each is less than one row from it with two tasks.
fn furthest_behind(weights: &[f64], served: &[u64]) -> usize {
    let total: f64 = weights.iter().sum();
    let next = served.iter().zip(weights).filter(|(_, w)| **w > 0.0).map(|(s, _)| *s).sum::<u64>() + 1;
    let behind = |t: usize| weights[t] / total * next as f64 - served[t] as f64;
    let drawn = (0..weights.len()).filter(|&t| weights[t] > 0.0);
    drawn.reduce(|best, t| if behind(t) > behind(best) { t } else { best }).unwrap_or_default()
}

fn wanted(seed: u64, task: &TaskOrder, number: usize, own: usize, position: u64, now: &Now) -> bool {
    match now.curriculum {
        None | Some(Curriculum::Sorted { .. }) => true,
        Some(Curriculum::Widening { start, by, .. }) => {
            let done = if *by > 0.0 { (now.progress / by).min(1.0) } else { 1.0 };
            // less a rounding error, so that 0.6 of 10 rows are 6 though the product is a little above
            let open = ((start + (1.0 - start) * done) * task.rows.len() as f64 - 1e-9).ceil().max(1.0);
            (task.rank[own] as f64) < open
        }
        Some(Curriculum::PassRate { target, width, floor, .. }) => {
            let Some(rate) = now.rates.get(&(task.rows.start + own)) else { return true };
            let distance = (f64::from(*rate) - target) / width;
            let chance = floor + (1.0 - floor) * (-0.5 * distance * distance).exp();
            Stream::new(seed, Purpose::Curriculum, &[number as u64, position]).next_f64() < chance
        }
    }
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "a list of one task")]
mod tests {
    use super::*;

    fn now<'a>(
        weights: &'a [f64],
        curriculum: Option<&'a Curriculum>,
        rates: &'a BTreeMap<usize, f32>,
    ) -> Now<'a> {
        Now { weights, progress: 0.0, curriculum, rates }
    }

    #[test]
    fn one_task_is_its_shuffled_order() {
        let (mut feed, mut cursor, none) = (Feed::new(5, &[0..7], None), Cursor::default(), BTreeMap::new());
        let mut order = Order::new(5, 7);
        for position in 0..20 {
            let row = feed.next(&mut cursor, &now(&[1.0], None, &none), &|_| false);
            assert_eq!(row, Ok(order.at(position)));
        }
    }

    #[test]
    fn tasks_get_their_shares_and_a_cursor_is_enough_to_go_on() {
        let tasks = [0..10, 10..15, 15..40];
        let (mut feed, mut cursor, none) = (Feed::new(1, &tasks, None), Cursor::default(), BTreeMap::new());
        let weights = [3.0, 0.0, 1.0];
        let mut drawn = Vec::new();
        let mut halfway = Cursor::default();
        for i in 0..40 {
            if i == 23 {
                halfway = cursor.clone();
            }
            drawn.push(feed.next(&mut cursor, &now(&weights, None, &none), &|_| false).unwrap());
            let second = cursor.served[2] as f64;
            assert!((second - 0.25 * (i + 1) as f64).abs() < 1.0, "{cursor:?}");
        }
        assert_eq!(cursor.served, [30, 0, 10]);
        let mut again = Feed::new(1, &tasks, None);
        let rest: Vec<usize> = (23..40)
            .map(|_| again.next(&mut halfway, &now(&weights, None, &none), &|_| false).unwrap())
            .collect();
        assert_eq!(drawn[23..], rest);
    }

    #[test]
    fn dropped_rows_never_come_and_a_task_without_rows_is_named() {
        let (mut feed, mut cursor, none) = (Feed::new(2, &[0..6], None), Cursor::default(), BTreeMap::new());
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..12 {
            seen.insert(feed.next(&mut cursor, &now(&[1.0], None, &none), &|row| row % 2 == 0).unwrap());
        }
        assert_eq!(seen.into_iter().collect::<Vec<_>>(), [1, 3, 5]);
        assert_eq!(feed.next(&mut cursor, &now(&[1.0], None, &none), &|_| true), Err(0));
    }

    #[test]
    fn sorted_and_widening_follow_the_column() {
        let difficulty: Vec<f64> = (0..10).map(|row| f64::from(9 - row)).collect();
        let none = BTreeMap::new();
        let sorted = Curriculum::Sorted { column: "d".into() };
        let (mut feed, mut cursor) = (Feed::new(3, &[0..10], Some(&difficulty)), Cursor::default());
        let rows: Vec<usize> = (0..10)
            .map(|_| feed.next(&mut cursor, &now(&[1.0], Some(&sorted), &none), &|_| false).unwrap())
            .collect();
        assert_eq!(rows, (0..10).rev().collect::<Vec<_>>());

        let widening = Curriculum::Widening { column: "d".into(), start: 0.2, by: 0.5 };
        for (progress, easiest) in [(0.0, 8), (0.25, 4), (0.5, 0)] {
            let mut cursor = Cursor::default();
            let seen: std::collections::BTreeSet<usize> = (0..40)
                .map(|_| {
                    let now = Now { progress, ..now(&[1.0], Some(&widening), &none) };
                    feed.next(&mut cursor, &now, &|_| false).unwrap()
                })
                .collect();
            assert_eq!(seen, (easiest..10).collect(), "at {progress}");
        }
    }

    #[test]
    fn rows_near_the_target_come_most_often() {
        let rates = BTreeMap::from([(0, 0.0), (1, 0.5), (2, 1.0), (3, 0.5)]);
        let curriculum = Curriculum::PassRate { target: 0.5, width: 0.2, decay: 0.5, floor: 0.05 };
        let (mut feed, mut cursor, mut counts) = (Feed::new(4, &[0..4], None), Cursor::default(), [0; 4]);
        for _ in 0..400 {
            counts[feed.next(&mut cursor, &now(&[1.0], Some(&curriculum), &rates), &|_| false).unwrap()] += 1;
        }
        // a row at distance 0.5 has a chance of 0.05 + 0.95 e^(-3.125) = 0.09 of that on the target
        assert!(
            counts[0] > 0 && counts[2] > 0 && counts[1].min(counts[3]) > 5 * counts[0].max(counts[2]),
            "{counts:?}"
        );
    }
}
