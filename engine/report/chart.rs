//! Line charts as inline SVG: a few series over steps, drawn without any outside resource.
//!
//! A chart knows numbers and names; what they mean is decided in [`html`](super::html).

use std::fmt::Write as _;

/// One line of a chart.
#[derive(Debug, Clone, PartialEq)]
pub struct Series {
    /// Legend entry.
    pub name: String,
    /// (step, value), steps ascending; values are finite.
    pub points: Vec<(f64, f64)>,
}

/// Width and height of a chart's coordinate system, and the room for its labels: left, bottom, top, right.
const SIZE: (f64, f64) = (360.0, 170.0);
const MARGIN: (f64, f64, f64, f64) = (52.0, 22.0, 8.0, 10.0);

/// More points than this are averaged in equal runs of steps, so that a page of a long run stays small.
const MOST_POINTS: usize = 400;

/// A noisy line of at least this many points is drawn faint under its moving mean.
const SMOOTH_FROM: usize = 30;

/// The chart of `series`: axes with round labels, one colour a series (classes `s0`, `s1`, …), and the points in
/// `data-points` for the pointer to read. Empty text where there is no point.
pub fn chart(title: &str, series: &[Series]) -> String {
    let all = || series.iter().flat_map(|s| &s.points);
    if all().next().is_none() {
        return String::new();
    }
    let (x0, x1) = range(all().map(|p| p.0));
    let (low, high) = range(all().map(|p| p.1));
    let ticks = ticks(low, high);
    let (y0, y1) = (ticks[0].min(low), ticks[ticks.len() - 1].max(high));
    let (left, bottom, top, right) = MARGIN;
    let x = |v: f64| left + (v - x0) / (x1 - x0) * (SIZE.0 - left - right);
    let y = |v: f64| SIZE.1 - bottom - (v - y0) / (y1 - y0) * (SIZE.1 - bottom - top);

    let mut svg = format!(
        "<svg viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{}\" data-x=\"{left},{},{x0},{x1}\">",
        SIZE.0,
        SIZE.1,
        escape(title),
        SIZE.0 - right
    );
    for &tick in &ticks {
        let _ = write!(
            svg,
            "<line class=\"grid\" x1=\"{left}\" x2=\"{}\" y1=\"{2:.1}\" y2=\"{2:.1}\"/><text class=\"y\" x=\"{3}\" y=\"{4:.1}\">{1}</text>",
            SIZE.0 - right,
            number(tick),
            y(tick),
            left - 6.0,
            y(tick) + 3.5
        );
    }
    for (at, step) in [("start", x0), ("end", x1)] {
        let _ =
            write!(svg, "<text class=\"x {at}\" x=\"{:.1}\" y=\"{}\">{}</text>", x(step), SIZE.1 - 6.0, step);
    }
    for (i, one) in series.iter().enumerate().filter(|(_, s)| !s.points.is_empty()) {
        let points = thinned(&one.points);
        let line = |points: &[(f64, f64)]| -> String {
            points.iter().map(|p| format!("{:.1},{:.1}", x(p.0), y(p.1))).collect::<Vec<_>>().join(" ")
        };
        let data: Vec<String> = points.iter().map(|p| format!("{},{}", p.0, number(p.1))).collect();
        let noisy = points.len() >= SMOOTH_FROM && !points.windows(2).all(|w| w[0].1 == w[1].1);
        let class = if noisy { "raw" } else { "line" };
        let _ = write!(
            svg,
            "<polyline class=\"{class} s{i}\" data-name=\"{}\" data-points=\"{}\" points=\"{}\"/>",
            escape(&one.name),
            data.join(" "),
            line(&points)
        );
        if noisy {
            let _ = write!(svg, "<polyline class=\"line s{i}\" points=\"{}\"/>", line(&moving_mean(&points)));
        }
        if points.len() == 1 {
            let _ = write!(
                svg,
                "<circle class=\"s{i}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\"/>",
                x(points[0].0),
                y(points[0].1)
            );
        }
    }
    svg + "<line class=\"cursor\" y1=\"8\" y2=\"148\"/></svg>"
}

/// Least and greatest value, widened where they are equal.
fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = values.fold((f64::MAX, f64::MIN), |(l, h), v| (l.min(v), h.max(v)));
    match high > low {
        true => (low, high),
        false if low == 0.0 => (0.0, 1.0),
        false => (low - low.abs() / 2.0, low + low.abs() / 2.0),
    }
}

/// Three to six round numbers that cover `low..=high` from below.
fn ticks(low: f64, high: f64) -> Vec<f64> {
    let rough = (high - low) / 4.0;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|s| *s >= rough).unwrap_or(power);
    let first = (low / step).floor();
    (0..).map(|i| (first + f64::from(i)) * step).take_while(|t| *t <= high + step * 0.01).collect()
}

fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let run = points.len().div_ceil(MOST_POINTS).max(1);
    let mean = |chunk: &[(f64, f64)]| chunk.iter().map(|p| p.1).sum::<f64>() / chunk.len() as f64;
    points.chunks(run).map(|chunk| (chunk[chunk.len() - 1].0, mean(chunk))).collect()
}

/// Mean over a window of a fifteenth of the points on each side.
fn moving_mean(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let reach = (points.len() / 15).max(1);
    (0..points.len())
        .map(|i| {
            let window = &points[i.saturating_sub(reach)..(i + reach + 1).min(points.len())];
            (points[i].0, window.iter().map(|p| p.1).sum::<f64>() / window.len() as f64)
        })
        .collect()
}

/// A number as a person reads it: four significant digits, thousands shortened to k, M and G.
pub fn number(value: f64) -> String {
    let short = |v: f64, unit: &str| {
        let digits = (3 - v.abs().log10().floor() as i32).max(0) as usize;
        let text = format!("{v:.digits$}");
        let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
        format!("{text}{unit}")
    };
    match value.abs() {
        0.0 => "0".into(),
        size if size < 1e-3 => format!("{value:.2e}"),
        size if size < 1e4 => short(value, ""),
        size if size < 1e6 => short(value / 1e3, "k"),
        size if size < 1e9 => short(value / 1e6, "M"),
        _ => short(value / 1e9, "G"),
    }
}

/// Text as it may stand in HTML, attributes included.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        let cases = [(0.0, "0"), (0.25, "0.25"), (150.0, "150"), (1234.5, "1234"), (56_871.0, "56.87k")];
        for (value, text) in cases {
            assert_eq!(number(value), text);
        }
        assert_eq!((number(2.5e-5), number(231_931_904.0)), ("2.50e-5".into(), "231.9M".into()));
        assert_eq!((number(-0.0429), number(0.004_212_3)), ("-0.0429".into(), "0.004212".into()));
    }

    #[test]
    fn ticks_are_round_and_cover_the_values() {
        assert_eq!(ticks(0.0, 1.0), [0.0, 0.5, 1.0]);
        assert_eq!(ticks(-3.0, 9.0), [-5.0, 0.0, 5.0]);
    }

    #[test]
    fn a_line_ends_where_its_last_point_is() {
        let series = Series { name: "reward".into(), points: vec![(1.0, 0.0), (3.0, 1.0)] };
        let svg = chart("reward", &[series]);
        // the last step sits at the right margin (360 - 10) and the greatest tick at the top margin (8)
        assert!(svg.contains("points=\"52.0,148.0 350.0,8.0\""), "{svg}");
        assert!(svg.contains("data-points=\"1,0 3,1\""));
        assert_eq!(chart("empty", &[]), "");
    }

    #[test]
    fn a_long_run_is_thinned_to_means() {
        let points: Vec<(f64, f64)> = (1..=4000).map(|i| (f64::from(i), f64::from(i % 2))).collect();
        let thin = thinned(&points);
        assert_eq!((thin.len(), thin[0], thin[399].0), (400, (10.0, 0.5), 4000.0));
    }
}
